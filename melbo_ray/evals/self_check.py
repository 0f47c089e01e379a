"""The self-check: it compares this implementation with plain transformers on the run's own model and prompts.

Every worker runs it when it starts (`Worker.ready`); the reference side is `model.plain`.
"""

import itertools
import socket
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError, first_line
from melbo_ray.model import plain
from melbo_ray.model.kv_cache import Request
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.plain import END, Tokens
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import generate
from melbo_ray.model.steering import Prompts, encode, target_log_probs
from melbo_ray.runs.checks import EXACT, PLAIN, Check
from melbo_ray.runs.manifest import Rendered
from melbo_ray.search.lockstep import value_and_grad
from melbo_ray.seeds import derive_seed

# Tokens per greedy text, and maximum number of texts: each token is a pass of the model.
_LENGTH, _TEXTS = 8, 4
# Part of the warnings about a fallback to a plainer way.
_FELL_BACK = "which costs time only"

Errors = tuple[float, int]
"""The largest error, and the number of comparisons."""


def selfcheck(
    model: LanguageModel, concepts: Sequence[Concept], config: Config, whole: bool = True
) -> dict[str, Check]:
    """Run the checks by name: `slice`, and for a `whole` model also `logits`, `scores` and `texts`.

    They cover every training prompt under two random vectors, of norm R, or of a tenth of the stream's norm if R is
    still to be calibrated.

    Raises:
        UserError: this implementation disagrees with plain transformers, or fails on this model.
    """
    tolerance = torch.finfo(model.dtype).eps ** 0.5
    training = {concept.name: model.tokenize(concept.prompt, config.system_prompt) for concept in concepts}
    prompts = _distinct(training.values())
    norm = _norm(model, prompts[0], config)
    config = config.at(norm)
    thetas = _thetas(model, norm, config)
    ways: dict[str, tuple[float, Callable[[], Errors]]] = {
        "slice": (tolerance, lambda: _slice(model, prompts, config, thetas))
    }
    if whole:
        held_out = {text for concept in concepts for text in concept.held_out.values()}
        others = [model.tokenize(text, config.system_prompt) for text in sorted(held_out)]
        longest = max(others, key=len)
        forced = [(training[c.name], [encode(model, text) for text in c.continuations]) for c in concepts]
        texts = _distinct([*prompts[: _TEXTS - 1], longest])
        ways |= {
            "logits": (tolerance, lambda: _logits(model, _distinct([*prompts, longest]), config, thetas)),
            "scores": (tolerance, lambda: _scores(model, forced, config, thetas)),
            "texts": (0.0, lambda: _texts(model, texts, config, thetas)),
        }
    return {name: _checked(name, *way) for name, way in ways.items()}


def take_prompts(model: LanguageModel, rendered: Rendered, concepts: Mapping[str, Concept], system_prompt: str) -> None:
    """Fix the rendered text of every prompt to that in the run's manifest, because a template may insert the date.

    Raises:
        UserError: the tokenizer gives other tokens for it.
    """
    for concept, prompts in rendered.items():
        for name, stored in prompts.items():
            prompt = concepts[concept].prompt if name == "training" else concepts[concept].held_out[name]
            model.kept.setdefault("rendered", {})[prompt, system_prompt] = stored.text
            if model.tokenize(prompt, system_prompt).tolist() != stored.tokens:
                raise UserError(
                    f"the tokenizer of {model.name!r} on {socket.gethostname()} makes other tokens of the prompt "
                    f"{name!r} than this run was begun with: install the versions that its run.json names"
                )


def _checked(name: str, tolerance: float, compare: Callable[[], Errors]) -> Check:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            error, compared = compare()
        except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # Models raise errors of any type for arguments that they do not accept.
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"self-check: {name} cannot be computed on this model ({reason})") from error
    for warning in warned:
        warnings.warn(warning.message, warning.category, stacklevel=2)
    if not error <= tolerance:
        much = f"{error:.0f} of {compared} tokens differ" if name == "texts" else f"relative error {error:.2g}"
        allowed = "none may" if name == "texts" else f"at most {tolerance:.1g} is rounding"
        raise UserError(f"self-check: {name} are not what plain transformers gives: {much}, {allowed}")
    fallen = [str(warning.message) for warning in warned if _FELL_BACK in str(warning.message)]
    return {
        "error": error, "tolerance": tolerance, "compared": compared, "verdict": PLAIN if fallen else EXACT,
        "reason": "; ".join(dict.fromkeys(fallen)),
    }  # fmt: skip


def _distinct(prompts: Iterable[Tokens]) -> list[Tokens]:
    return list({tuple(tokens.tolist()): tokens for tokens in prompts}.values())


def _norm(model: LanguageModel, tokens: Tokens, config: Config) -> float:
    """R, or a tenth of the residual stream's norm where R is calibrated later."""
    if config.radius != "auto":
        return config.radius
    with torch.no_grad():
        return 0.1 * float(plain.stream(model, tokens, config.source_layer).norm(dim=-1).median())


def _thetas(model: LanguageModel, norm: float, config: Config) -> Float[Tensor, "2 d_model"]:
    if config.limit is not None:
        norm = min(norm, 0.9 * config.limit)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "", 0, "self-check"))
    return nn.functional.normalize(torch.randn(2, model.d_model, generator=generator), dim=-1) * norm


def _relative(ours: Tensor, theirs: Tensor, size: Tensor | None = None) -> float:
    """The largest relative error of any row; relative to the norm of `size`, by default to that of `theirs`."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    if not theirs.isfinite().all():
        raise UserError("self-check: the model's own activations are not finite: try `dtype` float32")
    size = theirs if size is None else size.detach().float().cpu()
    return float(((ours - theirs).norm(dim=-1) / size.norm(dim=-1).clamp_min(1e-30)).max())


def _worst(errors: list[float]) -> Errors:
    # Python's max may ignore NaN.
    return float(torch.tensor(errors).max()), len(errors)


def _slice(model: LanguageModel, prompts: list[Tokens], config: Config, thetas: Float[Tensor, "2 d_model"]) -> Errors:
    """Errors of h_target at all positions of all prompts, and of the recorded step's loss and gradient."""
    # As in a run of chains: in one batch on a GPU, one at a time on the CPU.
    groups = [prompts] if model.device.type == "cuda" else [[tokens] for tokens in prompts]
    errors = []
    for group in groups:
        slice_ = Slice(model, group, config.source_layer, config.target_layer)
        shortest = min(map(len, group))
        own = config.model_copy(update={"z_from": min(config.z_from, shortest - 1)})
        expected = [plain.steps(model, tokens, (slice_.source, slice_.target), own, thetas) for tokens in group]
        for row, (tokens, steps) in enumerate(zip(group, expected, strict=True)):
            with torch.no_grad():
                h = slice_.h_target(thetas.to(model.device), torch.full((2,), row, device=model.device))
            errors += [_relative(h[i, : len(tokens)], step[0]) for i, step in enumerate(steps)]
        errors += _step_errors(slice_, expected, own, thetas)
    return _worst(errors)


def _step_errors(slice_: Slice, expected: list[list[Any]], config: Config, thetas: Tensor) -> list[float]:
    """Errors of loss and gradient of the recorded step, on batches shaped like those of a chain."""
    rows = torch.arange(len(expected)).repeat_interleave(config.block)
    errors = []
    for turn in range(2):
        which = [(place + turn) % 2 for place in range(len(rows))]
        steps = [expected[row][i] for row, i in zip(rows.tolist(), which, strict=True)]
        z_base = torch.stack([expected[row][1 - i][1] for row, i in zip(rows.tolist(), which, strict=True)])
        losses, found = value_and_grad(slice_, thetas[which], z_base, rows, config)
        for (_, z, loss, gradient), ours, slope in zip(steps, losses, found, strict=True):
            # z has an absolute error of eps ‖z‖, however small the loss.
            known = float(loss / (loss + torch.finfo(slice_.model.dtype).eps ** 0.5 * z.norm()))
            errors += [known * _relative(ours[None], loss[None]), known * _relative(slope, gradient)]
    return errors


def _logits(model: LanguageModel, prompts: list[Tokens], config: Config, thetas: Float[Tensor, "2 d_model"]) -> Errors:
    """Errors of next-token logits against single passes.

    They are those of one batch with the first prompt under both θ and all prompts under one θ, and those of all prompts
    under one θ with a shared prefix.
    """
    rows = torch.tensor([0, *range(len(prompts))])
    batch = thetas[[1] + [0] * len(prompts)]
    ours = Prompts(model, prompts, config.source_layer)
    apart = list(ours.logits(batch.to(model.device), rows))
    shared = list(ours.under(thetas[0].to(model.device)))
    errors = []
    for place, (row, theta) in enumerate(zip(rows.tolist(), batch, strict=True)):
        alone = plain.logits(model, prompts[row], config.source_layer, theta[None], 1)[0].cpu()
        size = alone - alone.mean()
        errors += [_relative(logits, alone, size) for logits in (apart[place], *shared[place - 1 : place])]
    return _worst(errors)


def _scores(
    model: LanguageModel, forced: list[tuple[Tokens, list[Tokens]]], config: Config, thetas: Float[Tensor, "2 d_model"]
) -> Errors:
    """Errors of the log-probabilities along each concept's first and last continuation, unsteered and steered."""
    errors = []
    for i, (prompt, branches) in enumerate(forced):
        batch = torch.stack([torch.zeros_like(thetas[0]), thetas[i % 2]])
        prompts = Prompts(model, [prompt], config.source_layer, [branches])
        logits = prompts.logits(batch.to(model.device))
        ours = [target_log_probs(row, prompts.targets[0]).split([*map(len, branches)]) for row in logits]
        for which in {0, len(branches) - 1}:
            branch = branches[which]
            tokens = torch.cat([prompt, branch[:-1]])
            alone = plain.logits(model, tokens, config.source_layer, batch, len(branch)).log_softmax(-1).cpu()
            told = alone[:, range(len(branch)), branch]
            # For nearly certain tokens the error is absolute, in nats, not relative to a log-probability near 0.
            errors += [_relative(ours[row][which], told[row], told[row].abs().clamp_min(1)) for row in range(2)]
    return _worst(errors)


def _texts(model: LanguageModel, prompts: list[Tokens], config: Config, thetas: Float[Tensor, "2 d_model"]) -> Errors:
    """The number of differing tokens in greedy texts, and of compared tokens, up to the first tie in each."""
    requests = [Request(tokens, thetas[i % 2], temperature=0) for i, tokens in enumerate(prompts)]
    differing = compared = 0
    for request, text in zip(
        requests, generate(model, requests, config.source_layer, max_new_tokens=_LENGTH), strict=True
    ):
        ours = [*text.tokens, *([END] if text.finish_reason == "stop" else [])]
        length = min(_LENGTH, model.max_length - len(request.tokens))
        asked = (model, request.tokens, config.source_layer, request.theta, length)
        wrong, read = _differing(ours, *plain.text(*asked), model)
        if wrong:
            # If transformers' text with its cache differs from that without, the one without is the reference.
            wrong, read = _differing(ours, *plain.reread(*asked), model)
        differing, compared = differing + wrong, compared + read
    return float(differing), compared


def _differing(ours: list[int], theirs: list[int], logits: list[Tensor], model: LanguageModel) -> Errors:
    """The numbers of differing and of compared tokens; the comparison ends at a tie up to rounding."""
    ends = model.end_tokens
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            here = logits[place]
            likely = here[ends].max() if one == END else here[one]
            rounding = 4 * torch.finfo(model.dtype).eps ** 0.5 * here.std()
            if here.max() - likely <= rounding:
                return 0, place
            break
    pairs = list(itertools.zip_longest(ours, theirs))
    return sum(one != other for one, other in pairs), len(pairs)
