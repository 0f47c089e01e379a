"""The residual stream of every layer under a vector, and the logits that follow from a changed stream."""

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from melbo_ray.model.architecture import stream, with_stream
from melbo_ray.model.hooks import logits_at, skipping, steering
from melbo_ray.model.language_model import LanguageModel

Change = Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]]


@contextlib.contextmanager
def changing(model: LanguageModel, layers: Sequence[int], change: Change) -> Generator[None]:
    """Within the context, the output h of each of the layers is change(h), computed in float32."""

    def put_out(_layer: nn.Module, _args: tuple, output: Any) -> Any:
        h = stream(output)
        return with_stream(output, change(h.float()).to(h.dtype))

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(model.layers[layer].register_forward_hook(put_out).remove)
        yield


class Streams:
    """Fixed texts, read under one vector at a time; padded on the right, which causal attention ignores.

    Args:
        model: the model.
        texts: token ids, (seq,) int64 each, a row each.
        source: layer to whose output θ is added.
        whole: whether the model's layers cannot be skipped (`steering.Prompts.way` is `whole`).

    Attributes:
        lengths: tokens of each text.
    """

    def __init__(
        self, model: LanguageModel, texts: Sequence[Int[Tensor, " _seq"]], source: int, whole: bool = False
    ) -> None:
        self.model, self.source, self.whole = model, source, whole
        self._in_tuple = False
        self.lengths = [len(text) for text in texts]
        self.tokens = nn.utils.rnn.pad_sequence([text.cpu() for text in texts], batch_first=True)

    @torch.no_grad()
    def under(
        self, theta: Float[Tensor, " d_model"], layers: Sequence[int], ablated: Float[Tensor, " d_model"] | None = None
    ) -> Float[Tensor, "layers rows seq d_model"]:
        """The outputs of `layers` with θ added after the source layer, float32 on the CPU.

        If a unit vector `ablated` is given, every layer's output from the source on loses its component along it.
        """
        found: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(_layer: nn.Module, _args: tuple, output: Any) -> None:
                self._in_tuple = isinstance(output, tuple)
                found[layer] = stream(output).float().cpu()

            return hook

        last = len(self.model.layers)
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(steering(self.model, self.source, theta.expand(len(self.tokens), -1)))
            if ablated is not None:
                unit = ablated.to(self.model.device)
                without = lambda h: h - (h @ unit.to(h.device))[..., None] * unit.to(h.device)  # noqa: E731
                hooks.enter_context(changing(self.model, range(self.source, last), without))
            for layer in layers:  # registered last, so that they see what the hooks above have changed
                hooks.callback(self.model.layers[layer].register_forward_hook(keep(layer)).remove)
            hooks.enter_context(logits_at(self.model, (torch.zeros(1).long(), torch.zeros(1).long())))
            self.model.network(input_ids=self.tokens.to(self.model.device), use_cache=False)
        return torch.stack([found[layer] for layer in layers])

    @torch.no_grad()
    def logits(
        self,
        layer: int,
        h: Float[Tensor, "n rows seq d_model"],
        where: tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]],
    ) -> Float[Tensor, "n kept vocab"]:
        """The logits at the (row, position) pairs `where` if the layer's output is h, float32."""
        n, rows = h.shape[:2]
        flat = h.flatten(0, 1).to(self.model.device, self.model.dtype)
        at = torch.cat([where[0] + rows * i for i in range(n)]), where[1].repeat(n)
        replaced = (
            changing(self.model, [layer], lambda _: flat.float())
            if self.whole
            else skipping(self.model, layer, flat, self._in_tuple)
        )
        with replaced, logits_at(self.model, at):
            tokens = self.tokens.repeat(n, 1).to(self.model.device)
            logits = self.model.network(input_ids=tokens, use_cache=False).logits[0]
        return logits.float().cpu().view(n, len(where[0]), -1)
