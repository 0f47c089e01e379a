"""The base vector θ₀: MELBO candidates, mean differences of prompts, singular vectors, or vectors from a file.

Source: Mack and Turner (2024), "Mechanistically eliciting latent behaviors in language models": steering vectors of
fixed norm that maximise the change of the target layer's activations.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import BaseOptions
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.candidates import Candidate, judge, rank
from melbo_ray.search.given import Look, at_norms, avoided, given, norms, singular
from melbo_ray.search.power import power
from melbo_ray.search.promotion import promote
from melbo_ray.search.radius import Calibration, calibrate
from melbo_ray.search.sink import target_shares
from melbo_ray.search.stages import Once, Stages, compute, finish
from melbo_ray.search.vector_io import SOUGHT, names_vectors
from melbo_ray.seeds import derive_seed

_STEP = 0.05
_MOMENTUM = 0.7
# Few candidates show a given concept (none to four of 20 on Qwen2.5-Coder-0.5B), hence several rounds. Candidates are
# judged every `_LOOK` steps of the ascent.
_ROUNDS, _LOOK = 3, 10
# Steps of a stage; a divisor of `_LOOK`.
_STAGE = 5


@dataclass(frozen=True)
class Base:
    """The base vector of a concept, with the candidates that it was chosen from.

    Attributes:
        theta: θ₀, (d_model,) float32 on the CPU, of norm R.
        candidates: all candidates, ranked.
        calibration: the calibration of R; None if R was given, or a vector from a file keeps its norm.
        avoided: what the chain avoids besides θ₀ (`given.avoided`).
        shares: composition of the target displacement (`sink.target_shares`).
    """

    theta: Float[Tensor, " d_model"]
    candidates: list[Candidate]
    calibration: Calibration | None
    avoided: Float[Tensor, "k d_model"]
    shares: dict[str, float]


def base_vector(slice: Slice, concept: Concept, options: BaseOptions) -> Base:
    """Find the base vector θ₀ of a concept.

    Args:
        slice: the slice on one prompt, on which candidates are optimised and judged.
        concept: the concept that the base should elicit.
        options: the method (`base`), the radius, and the choice of the candidate: `base_index`, or by default the
            texts under each (`candidates.rank`).

    Raises:
        UserError: an index out of range, vectors that cannot be had (`given`), or no usable radius.
    """
    return finish(base_search(slice, concept, options))


def base_search(slice: Slice, concept: Concept, options: BaseOptions, once: Once = compute) -> Stages[Base]:
    """`base_vector` in stages; with the same `once` another call continues where this one was interrupted."""
    fixed, first = None if options.base in SOUGHT else (yield from _fixed(slice, concept, options, once)), 0
    calibration, wanted = None, options.base_index
    if options.radius == "auto" and not names_vectors(options.base):
        seed = derive_seed(options.seed, concept.name, 0, "radius")
        calibration = Calibration(**once("radius", lambda: asdict(calibrate(slice, seed))))
        yield f"R is {calibration.radius:.3g}"
    radius = calibration.radius if calibration else options.radius
    if options.base == "melbo":
        found, unsteered_shows = yield from _ascended(slice, concept, options, float(radius), once)
    elif fixed is None:
        tried = norms(float(radius), calibration is not None)
        thetas = promote(slice.model, slice.prompts[0], concept, slice.source, tried, once)
        looks = ((f"promoted to norm {norm:.3g}", None, theta) for norm, theta in zip(tried, thetas, strict=True))
        found, unsteered_shows = yield from _until_one_shows(slice, concept, options, looks, first, once)
    else:
        if wanted is not None and wanted < len(fixed) and names_vectors(options.base):
            # A foreign chain may have a thousand vectors, and judging each by its texts takes hours.
            fixed, first = fixed[wanted : wanted + 1], wanted
        looks = at_norms(fixed, radius, calibration is not None)
        found, unsteered_shows = yield from _until_one_shows(slice, concept, options, looks, first, once)
    if wanted is not None and wanted >= first + len(found):
        raise UserError(f"base index {wanted} is out of range: there are {len(found)} candidates, from 0")
    ranked = rank(found, wanted, unsteered_shows)
    theta = next(candidate.theta for candidate in ranked if candidate.taken)
    out_of_bounds = yield from avoided(slice, concept, options, theta, once)
    return Base(theta, ranked, calibration, out_of_bounds, target_shares(slice, theta))


def _fixed(slice: Slice, concept: Concept, options: BaseOptions, once: Once) -> Stages[Float[Tensor, "n d_model"]]:
    """The candidates of a base that is not sought by ascent, at any norm."""
    found = yield from given(slice, concept, options, once=once)
    # A singular vector has no sign.
    return found if singular(options, "base") is None else torch.stack([found, -found], 1).flatten(0, 1)


def _ascended(
    slice: Slice, concept: Concept, options: BaseOptions, radius: float, once: Once
) -> Stages[tuple[list[Candidate], bool]]:
    """MELBO's candidates, of at most `_ROUNDS` sets: until one shows the concept firmly."""
    found, unsteered_shows, start = [], False, None
    if options.melbo_start == "power":
        start, _ = yield from power(slice, options.candidates, options.melbo_from, options.seed, once)
    for number in range(_ROUNDS):
        start = start if number == 0 else None
        taken = (
            torch.stack([c.theta for c in found if c.steps == options.melbo_steps])
            if found
            else torch.empty(0, slice.model.d_model)
        )
        if found and len(taken) + options.candidates > slice.model.d_model:
            break
        looks = (
            (f"set {number + 1} of candidates: {steps} of at most {options.melbo_steps} steps", steps, thetas)
            for steps, thetas in maximise(slice, options, concept.name, radius, taken, once, start)
        )
        judged, unsteered_shows = yield from _until_one_shows(slice, concept, options, looks, len(found), once)
        found += judged
        if any(candidate.firm for candidate in judged):
            break
    return found, unsteered_shows


def _until_one_shows(
    slice: Slice, concept: Concept, options: BaseOptions, looks: Iterable[Look], first: int, once: Once
) -> Stages[tuple[list[Candidate], bool]]:
    """Judge candidates look by look until a strong one shows the concept firmly.

    A long ascent or a large norm breaks some models before a candidate shows the concept, and a short or small one has
    no effect on others. Once a weak candidate shows the concept firmly, the search continues as long as the next look
    finds a stronger one. Also returns whether the unsteered model shows the concept.
    """
    found, unsteered_shows, farthest = [], False, -inf
    for done, steps, thetas in looks:
        yield done
        if steps is not None and steps % _LOOK and steps != options.melbo_steps:
            continue
        judged, unsteered_shows = yield from _judged(slice, concept, options, thetas, first + len(found), once)
        found += [replace(candidate, steps=steps) for candidate in judged]
        far = max((candidate.unsteered_kl for candidate in judged if candidate.firm), default=-inf)
        if any(candidate.firm and candidate.strong for candidate in judged) or far <= farthest > -inf:
            break
        farthest = far
    return found, unsteered_shows


def _judged(
    slice: Slice, concept: Concept, options: BaseOptions, thetas: Float[Tensor, "n d_model"], first: int, once: Once
) -> Stages[tuple[list[Candidate], bool]]:
    device = slice.model.device
    with torch.no_grad():
        unsteered = slice.h_target(torch.zeros(1, slice.model.d_model, device=device)).float()
        changes = objective(slice, thetas.to(device), options, unsteered).tolist()
    return (yield from judge(slice, concept, options, thetas, changes, first, once))


def objective(
    slice: Slice, theta: Float[Tensor, "batch d_model"], options: BaseOptions, unsteered: Float[Tensor, "1 seq d_model"]
) -> Float[Tensor, " batch"]:
    """MELBO's objective of each θ: ( Σ over d_model of ( ‖Δ‖ over positions )^p )^(1/q), Δ = h_target(θ) − h_target(0).

    The inner norm runs over token positions from `options.melbo_from` on, as in Mack's code, not over d_model. At
    p = q = 2 the objective is the Frobenius norm of Δ, the post's formula.
    """
    change = (slice.h_target(theta).float() - unsteered)[:, options.melbo_from :]
    return change.norm(dim=1).pow(options.melbo_p).sum(-1).pow(1 / options.melbo_q)


def maximise(
    slice: Slice,
    options: BaseOptions,
    concept: str,
    radius: float,
    taken: Float[Tensor, "n d_model"],
    once: Once = compute,
    start: Float[Tensor, "candidates d_model"] | None = None,
) -> Iterator[tuple[int, Float[Tensor, "candidates d_model"]]]:
    """Maximise MELBO's objective; yields the number of steps and the candidates every five steps and at the end.

    The candidates are orthogonal vectors of norm R, each optimised in the complement of the earlier ones and of `taken`
    (orthogonal, of norm R; may be empty). They begin at `start`, or at seeded random vectors. A step follows the
    tangent part of the gradient, normalised and with momentum; then Gram-Schmidt restores orthogonality and norm R.

    Raises:
        UserError: more candidates than d_model, or no token position left for the objective.
    """
    d_model = slice.model.d_model
    if options.candidates > d_model:
        raise UserError(f"{options.candidates} candidates cannot be orthogonal in d_model = {d_model}")
    if options.melbo_from >= slice.h_source.shape[1]:
        raise UserError(f"`melbo_from` {options.melbo_from}: the prompt has only {slice.h_source.shape[1]} tokens")
    if start is None:
        generator = torch.Generator().manual_seed(derive_seed(options.seed, concept, len(taken), "melbo"))
        start = torch.randn(options.candidates, d_model, generator=generator)
    theta = retract(torch.cat([taken, start]), radius)[len(taken) :]
    velocity, before = torch.zeros_like(theta), 0
    for step in [*range(_STAGE, options.melbo_steps, _STAGE), options.melbo_steps]:
        climb = partial(_climb, slice, options, radius, taken, theta, velocity, step - before)
        theta, velocity = once(f"{len(taken):04d}-ascent-{step:04d}", climb)
        yield step, theta
        before = step


def _climb(
    slice: Slice, options: BaseOptions, radius: float, taken: Tensor, theta: Tensor, velocity: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The candidates and their velocity after further steps of ascent, on the CPU."""
    device = slice.model.device
    taken, theta, velocity = taken.to(device), theta.to(device), velocity.to(device)
    with torch.no_grad():
        unsteered = slice.h_target(torch.zeros(1, slice.model.d_model, device=device)).float()
    for _ in range(steps):
        gradient = tangent(_ascent(slice, theta, options, unsteered), theta)
        gradient = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        velocity = _MOMENTUM * velocity + gradient
        moved = torch.cat([taken, theta + _STEP * radius * velocity])
        theta = retract(moved, radius)[len(taken) :]
    return theta.cpu().clone(), velocity.cpu()


def _ascent(slice: Slice, theta: Tensor, options: BaseOptions, unsteered: Tensor) -> Tensor:
    """The gradient of every row's objective."""
    gradients = []
    for part in theta.detach().split(slice.rows_at_once):
        free = part.clone().requires_grad_()
        gradients += torch.autograd.grad(objective(slice, free, options, unsteered).sum(), free)
    return torch.cat(gradients)


def tangent(gradient: Float[Tensor, "batch d_model"], theta: Float[Tensor, "batch d_model"]) -> Tensor:
    """The part of each gradient tangent to the sphere through θ: g − (g·θ) θ / ‖θ‖²."""
    along = (gradient * theta).sum(-1, keepdim=True) / (theta * theta).sum(-1, keepdim=True)
    return gradient - along * theta


def retract(theta: Float[Tensor, "batch d_model"], radius: float) -> Float[Tensor, "batch d_model"]:
    """Each row's part orthogonal to the earlier rows, scaled to norm `radius` (Gram-Schmidt by QR, in float64)."""
    q, r = torch.linalg.qr(theta.double().T)
    return (q.T * torch.sign(r.diagonal())[:, None] * radius).to(theta.dtype)
