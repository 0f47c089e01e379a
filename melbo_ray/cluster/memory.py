"""The memory of a worker, estimated from the shape of its model; plan, layout and benchmark share this formula.

It is calibrated against the resident peaks of fresh processes (`benchmarks/bench.py --only memory` compares both).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals.catalog import resolve
from melbo_ray.evals.dose import DOSES
from melbo_ray.evals.generalization import LENGTH
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.products import BFLOAT16
from melbo_ray.model.residual_slice import GRADIENT_TOKENS
from melbo_ray.model.sampling import default_slots, slot_bytes, width
from melbo_ray.model.steering import PASS_TOKENS, encode
from melbo_ray.search.given import seeks, singular

# Resident memory of a process with torch, transformers and Ray before it loads weights.
_PROCESS = 480 << 20
# Norms, rotary embeddings and residual sums of a decoder layer keep this many times d_model values per token.
_KEPT_BESIDE_PRODUCTS = 4
USABLE = 0.9
"""The part of a GPU's memory that workers may fill."""
_FLOAT32 = 4
# J or H, what `curvature` makes of it, and its eigenvectors, in float64.
_MATRICES, _FLOAT64 = 5, 8


@dataclass(frozen=True)
class Demand:
    """Peak memory of a worker, bytes.

    Attributes:
        weights: the loaded parameters.
        loading: pages of the weight file that are resident while loading, if its dtype differs.
        packed: packed copies of the weights, made on the CPU if the layout allows.
        work: activations, basis, keys and values, logits, and cached results of evaluations, on the CPU.
        work_on_gpu: the same on a GPU, where the batch has more slots.
        rounded: bfloat16 copies of the layers' weights for `eval_products`, on the CPU.
    """

    weights: int
    loading: int
    packed: int
    work: int
    work_on_gpu: int
    rounded: int = 0

    def on_cpu(self, packed: bool) -> int:
        """Resident memory of a worker on the CPU, including its process."""
        return _PROCESS + self.weights + max(self.loading, self.work + self.rounded + (self.packed if packed else 0))

    @property
    def on_gpu(self) -> int:
        """GPU memory of a worker; nothing is packed there, and the process is in host memory."""
        return self.weights + self.work_on_gpu


@dataclass(frozen=True)
class Demands:
    """Peak memory of the two kinds of worker."""

    chain: Demand
    evaluator: Demand


def demands(
    model: LanguageModel,
    config: Config,
    concepts: Sequence[Concept],
    published: torch.dtype | None = None,
    whole: bool = False,
) -> Demands:
    """Peak memory of each kind of worker in a study.

    Args:
        model: the model, or a sketch of it.
        config: options of the study.
        concepts: concepts of the study.
        published: dtype of the weights in their file; weights of the model's own dtype are mapped, not copied.
        whole: whether chains load the whole model (`partial.reads_whole`).
    """
    share = published.itemsize / model.dtype.itemsize if published not in (None, model.dtype) else 0.0
    return Demands(_chain(model, config, concepts, share, whole), _evaluator(model, config, concepts, share))


def _chain(model: LanguageModel, config: Config, concepts: Sequence[Concept], share: float, whole: bool) -> Demand:
    """A chain actor: the layers up to the target, embeddings and head; the slice's products, forward and backward."""
    upper, slice_ = model.layers[config.target_layer + 1 :], _slice(model, config)
    tokens = config.block * sum(_length(model, config, concept.prompt) for concept in concepts)
    basis = len(concepts) * config.num_vectors * model.d_model * _FLOAT32
    work = tokens * _kept(slice_, model) + basis
    weights = _bytes([model.network]) - (0 if whole else _bytes(upper))
    return Demand(weights, int(share * weights), _packed_slice(model, config), work, work)


def _evaluator(model: LanguageModel, config: Config, concepts: Sequence[Concept], share: float) -> Demand:
    """An evaluator: the whole model, its products in decoding, and the larger of base search and texts with logits."""
    prompts = [_length(model, config, concept.prompt) for concept in concepts]
    # Singular vectors are sought in a block of twice as many, each with both signs.
    sought = [4 * (singular(config, name) or 0) for name in ("base", "orthogonal_to")]
    at_once = max(*sought, config.candidates * (4 if config.melbo_start == "power" else 1))
    ascending = max(*prompts, min(at_once * max(prompts), GRADIENT_TOKENS))
    search = ascending * _kept(_slice(model, config), model) if seeks(config) else 0
    names = {*resolve(config.evals)}
    if names & {"jacobian", "hessian", "gain"}:  # which differentiate the slice in passes of as many tokens
        kept = GRADIENT_TOKENS * _kept(_slice(model, config), model)
        search = max(search, kept + _MATRICES * _FLOAT64 * model.d_model**2)
    head = model.network.get_output_embeddings()
    packed = _bytes(model.layers, products=True) + _bytes([head], products=True)
    if "shuffled" in names:  # which optimises vectors as a chain actor does
        packed += _packed_slice(model, config)
    work = [max(search, _logits(model, config, concepts) + _texts(model, config, concepts, d)) for d in ("cpu", "cuda")]
    rounded = _bytes(model.layers, products=True) // 2 if config.eval_products == BFLOAT16 else 0
    weights = _bytes([model.network])
    return Demand(weights, int(share * weights), packed, *work, rounded)


def _texts(model: LanguageModel, config: Config, concepts: Sequence[Concept], device: str) -> int:
    """Keys and values of a full batch of slots, and of the prompts being prefilled, bytes."""
    longest = max(_length(model, config, prompt) for c in concepts for prompt in (c.prompt, *c.held_out.values()))
    wide = width(longest + config.max_new_tokens)
    slots = default_slots(model.network, wide, device)
    return slots * (slot_bytes(model.network, wide) + slot_bytes(model.network, longest))


def _logits(model: LanguageModel, config: Config, concepts: Sequence[Concept]) -> int:
    """The cached log-probabilities along the base's texts; the logits of one pass, twice; float32, bytes."""
    kept = read = 0
    for concept in concepts:
        prompts, length = 1 + len(concept.held_out), _length(model, config, concept.prompt)
        texts = [len(encode(model, text)) for text in concept.continuations]
        kept += prompts * LENGTH
        # `generalization` forces the base's text and one continuation on every prompt, `dose` all of them per dose.
        for rows, forced in ((prompts, LENGTH + texts[0]), (DOSES, sum(texts))):
            read = max(read, min(rows, max(1, PASS_TOKENS // (length + forced))) * forced)
    return (kept + 2 * read) * model.network.config.get_text_config().vocab_size * _FLOAT32


def _length(model: LanguageModel, config: Config, prompt: str) -> int:
    return len(model.tokenize(prompt, config.system_prompt))


def _slice(model: LanguageModel, config: Config) -> nn.ModuleList:
    return model.layers[config.source_layer + 1 : config.target_layer + 1]


def _packed_slice(model: LanguageModel, config: Config) -> int:
    """The packed products of a slice, forward and backward, bytes."""
    return 2 * _bytes(_slice(model, config), products=True)


def _kept(layers: nn.ModuleList, model: LanguageModel) -> int:
    """Bytes per token that these layers keep for the backward pass, mostly the outputs of products.

    Weights are frozen, so inputs of products are not kept, except the widest one, as the output of an activation.
    """
    values = 0
    for layer in layers:
        shapes = [weight.shape for weight in layer.parameters() if weight.ndim == 2]
        values += sum(rows for rows, _ in shapes) + max(columns for _, columns in shapes)
        values += _KEPT_BESIDE_PRODUCTS * model.d_model
    return values * model.dtype.itemsize


def _bytes(modules: Iterable[nn.Module], products: bool = False) -> int:
    """Bytes of all parameters, or of the matrices only (`products`); a shared parameter counts once."""
    found = {id(p): p for module in modules for p in module.parameters() if p.ndim >= 2 or not products}
    return sum(parameter.nbytes for parameter in found.values())
