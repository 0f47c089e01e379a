"""Steer any transformers model in place: `with steer(model, vector): model.generate(**inputs)`.

Unlike `hooks.steering`, which a run uses, it finds the layer, tells prompt from generated tokens and follows `generate`
through left padding, caches and beams. Vectors carry their layer, or the caller names it.
"""

import contextlib
import warnings
import weakref
from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from melbo_ray.errors import UserError
from melbo_ray.model.architecture import decoder_layers, stream, with_stream
from melbo_ray.model.fingerprint import fingerprint
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.token_scope import Reading, Scope, check_scope

Operation = Literal["add", "ablate"]
_FINGERPRINTS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def steer(
    model: Any,
    vectors: Any,
    *,
    layer: int | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    tokens: Scope = "all",
    operation: Operation = "add",
    per_row: bool = False,
) -> Generator[None]:
    """Within the context, every forward pass of the model is steered; contexts nest, and leave no hook behind.

    Args:
        model: a transformers causal model, or a `LanguageModel`.
        vectors: a vector, or a sequence of vectors, which act together: vectors of a run, or arrays and tensors
            (d_model,), whose `layer` must be given.
        layer: layer to whose output the vectors are added, counted from 0; by default each vector's own.
        weights: factor of each vector.
        scale: factor of all.
        tokens: which tokens are steered: `all`; `prompt`; `generated`, whose first was chosen at the prompt's end;
            or positions, counted from a row's first token that is no padding, or, negative, from its prompt's end.
            Outside of `generate` the prompt is what a pass without cached tokens reads.
        operation: `add`, or `ablate`: project the stream's components along the vectors out, `scale` of them.
        per_row: vector i acts on row i of the batch alone; None leaves a row as it is.

    Raises:
        UserError: no transformers model, a compiled one, no such layer, another d_model, vectors that are not finite,
            or options that contradict each other; in a pass, other rows than vectors, or tokens that cannot be told.
    """
    network, layers = _parts(model)
    scope = check_scope(tokens)
    effects = _effects(network, len(layers), vectors, layer, weights, scale, operation, per_row)
    reading = Reading(scope)
    with contextlib.ExitStack() as stack:
        owner = next(module for module in network.modules() if any(child is layers for child in module.children()))
        stack.callback(owner.register_forward_pre_hook(reading.begin, with_kwargs=True).remove)
        stack.enter_context(_following(network, reading))
        for at, change in effects.items():
            stack.callback(layers[at].register_forward_hook(_hook(change, scale, operation, per_row, reading)).remove)
        yield


def _parts(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """The network and its decoder layers."""
    network = model.network if isinstance(model, LanguageModel) else model
    if not isinstance(network, nn.Module) or not hasattr(getattr(network, "config", None), "get_text_config"):
        raise UserError(f"cannot steer {type(model).__name__}: expected a transformers model or a LanguageModel")
    # A compiled module does not see hooks that come later, and would silently stay unsteered.
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in network.modules()):
        raise UserError("cannot steer a compiled model, which takes no further hooks: steer the one it was made from")
    layers = model.layers if isinstance(model, LanguageModel) else decoder_layers(network)
    return network, layers


def _effects(
    network: Any,
    depth: int,
    vectors: Any,
    layer: int | None,
    weights: Sequence[float] | None,
    scale: float,
    operation: str,
    per_row: bool,
) -> dict[int, Float[Tensor, "n d_model"]]:
    """What acts at each layer: one row to add, an orthonormal basis to ablate, or a row for each row of the batch."""
    if operation not in ("add", "ablate"):
        raise UserError(f"`operation` is {operation!r}: expected add or ablate")
    several = hasattr(vectors, "__getitem__") and getattr(vectors, "ndim", 2) == 2
    given = list(vectors) if several else [vectors]
    if per_row and not several:
        raise UserError("`per_row` expects a sequence with a vector, or None, for each row of the batch")
    if weights is not None and (len(weights) != len(given) or operation == "ablate"):
        what = "`ablate` takes none" if operation == "ablate" else f"{len(weights)} for {len(given)} vectors"
        raise UserError(f"`weights` does not fit: {what}")
    width = network.config.get_text_config().hidden_size
    places, rows = set(), []
    for vector, weight in zip(given, weights or [1.0] * len(given), strict=True):
        rows.append(torch.zeros(width) if vector is None and per_row else weight * _theta(vector, width))
        if vector is not None:
            places.add(_layer(vector, layer, depth))
            _compare(network, vector)
    if not places:
        raise UserError("no vectors were given")
    if per_row and len(places) > 1:
        raise UserError(f"vectors of the layers {sorted(places)} cannot share `per_row`: nest a context for each layer")
    if per_row:
        return {places.pop(): torch.stack(rows) if operation == "add" else _units(rows)}
    by_layer = defaultdict(list)
    for vector, row in zip(given, rows, strict=True):
        by_layer[_layer(vector, layer, depth)].append(row)
    combine = _basis if operation == "ablate" else lambda rows: torch.stack(rows).sum(0, keepdim=True)
    return {at: combine(rows) for at, rows in by_layer.items()}


def _theta(vector: Any, width: int) -> Float[Tensor, " d_model"]:
    values = getattr(vector, "theta", vector)
    try:
        theta = (values.detach() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))).cpu().float()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"a {type(vector).__name__} is no steering vector: expected a vector of a run, or an array"
        ) from None
    if tuple(theta.shape) != (width,):
        shape = "×".join(map(str, theta.shape))
        raise UserError(f"a vector has shape {shape or 'of a number'}, the model's d_model is {width}")
    if not bool(theta.isfinite().all()):
        raise UserError("a vector is not finite")
    return theta


def _layer(vector: Any, layer: int | None, depth: int) -> int:
    own = getattr(getattr(vector, "site", None), "layer", None)
    at = own if layer is None else layer
    if at is None:
        raise UserError("the vector does not say its layer: give `layer`, counted from 0")
    if not 0 <= at < depth:
        raise UserError(f"layer {at} is out of range: the model has {depth} layers, from 0")
    return at


def _compare(network: nn.Module, vector: Any) -> None:
    """Warn, once for a model and place, of a vector that was found on other weights."""
    site = getattr(vector, "site", None)
    # Weights that accelerate keeps on disk cannot be read here.
    if site is None or site.fingerprint is None or any(weight.is_meta for weight in network.parameters()):
        return
    if network not in _FINGERPRINTS:
        _FINGERPRINTS[network] = fingerprint(network.config, network.state_dict())
    if _FINGERPRINTS[network] != site.fingerprint:
        warnings.warn(
            f"the vector was found on {site.model!r}, and this model has other weights, or another dtype "
            f"(fingerprint {_FINGERPRINTS[network][:12]}, not {site.fingerprint[:12]}): effects may differ",
            stacklevel=6,
        )


def _units(rows: list[Tensor]) -> Float[Tensor, "n d_model"]:
    return nn.functional.normalize(torch.stack(rows).double(), dim=-1).float()


def _basis(rows: list[Tensor]) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the span of the rows."""
    _, sizes, basis = torch.linalg.svd(_units(rows).double(), full_matrices=False)
    return basis[sizes > 1e-6].float()


def _hook(change: Tensor, scale: float, operation: str, per_row: bool, reading: Reading) -> Any:
    """The forward hook of a layer."""
    moved: dict[torch.device, Tensor] = {}

    def act(_layer: nn.Module, _args: tuple, output: Any) -> Any:
        h = stream(output)
        where = reading.where(h)
        if h.device not in moved:
            moved[h.device] = change.to(h.device)
        rows = reading.spread(moved[h.device], len(h)) if per_row else moved[h.device]
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        rows = rows.to(wide.dtype)
        if operation == "add":
            steered = wide + scale * rows[:, None]
        elif per_row:
            units = rows[:, None]
            steered = wide - scale * (wide * units).sum(-1, keepdim=True) * units
        else:
            steered = wide - scale * (wide @ rows.T) @ rows
        steered = steered.to(h.dtype)
        return with_stream(output, steered if where is None else torch.where(where[..., None], steered, h))

    return act


@contextlib.contextmanager
def _following(network: Any, reading: Reading) -> Generator[None]:
    """Within the context, `generate` tells `reading` of its prompt, and does not compile its steps."""
    before, own = network.generate, vars(network).get("generate")

    def generate(*args: Any, **kwargs: Any) -> Any:
        with reading.generating(args, kwargs):
            return before(*args, **{"disable_compile": True} | kwargs)

    network.generate = generate
    try:
        yield
    finally:
        # An instance attribute shadows the class's method.
        if own is None:
            del network.generate
        else:
            network.generate = own
