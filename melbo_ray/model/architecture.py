"""What differs between model families."""

from torch import nn
from transformers import PreTrainedModel

from melbo_ray.errors import UserError


def decoder_layers(network: PreTrainedModel) -> nn.ModuleList:
    """The one list of modules as long as the configuration's number of layers.

    Raises:
        UserError: none, or several.
    """
    count = network.config.get_text_config().num_hidden_layers
    found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise UserError(
            f"cannot tell the decoder layers of {type(network).__name__}: {len(found)} module lists have "
            f"{count} entries, expected 1; wrap the model with LanguageModel(network, tokenizer, layers)"
        )
    return found[0]
