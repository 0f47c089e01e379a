"""Dose-response: KL and concept score against the norm of a direction."""

import torch
from jaxtyping import Float
from torch import Tensor

from melbo_ray.evals.context import Row, Rows, Study, Vectors
from melbo_ray.evals.kl import at_norm, distances, divergences, fetched, named
from melbo_ray.model.steering import target_log_probs

ALPHAS = tuple(i / 4 for i in range(1, 9))
_STEPS_TO_RADIUS = 3
DOSES = len(ALPHAS) + _STEPS_TO_RADIUS
"""Number of norms per vector, which are evaluated in one batch."""
_HALVINGS = 6
_COLUMNS = ("norm", "kl_from_base", "kl_to_base", "kl_from_unsteered")


def run(study: Study, vectors: Vectors) -> Rows:
    """Evaluate each direction on two grids of norms and at two points derived from them, distinguished by `scale`.

    - `alpha`: α times the vector's norm, α = 0.25 … 2 in steps of 0.25.
    - `radius`: norms from the vector's own to the radius R, in equal ratios, ending at R.
    - `half`: the smallest norm at which KL(P‖P_base) is half of the unsteered one, by bisection between doses of the
      grids, so a dip narrower than the grid is missed; `norm` is null if no dose reaches it.
    - `knee`: the α with the largest second difference of KL(P‖P_unsteered), where its plateau ends.
    """
    study = study.rounded
    rows: list[Row] = []
    vectors = vectors.take([i for i, norm in enumerate(vectors.norms) if norm > 0])
    curves = []
    for theta, norm in zip(vectors.theta, vectors.norms, strict=True):
        doses = [("alpha", alpha * norm) for alpha in ALPHAS] + [("radius", n) for n in _to_radius(study, norm)]
        curves.append(measure(study, theta, doses))
    halves = _halves(study, vectors, curves)
    for index, curve, half in zip(vectors.index, curves, halves, strict=True):
        rows += [study.row(vectors.kind, index, **row) for row in (*curve, _knee(curve[: len(ALPHAS)]), half)]
    return {"dose": rows}


def measure(study: Study, theta: Float[Tensor, " d_model"], doses: list[tuple[str, float]]) -> list[Row]:
    """The columns of `dose` for the direction of `theta` at each (scale, norm)."""
    thetas = torch.cat([at_norm(theta[None], norm) for _, norm in doses])
    return [
        {"scale": scale, "norm": norm, **columns}
        for (scale, norm), columns in zip(doses, measure_all(study, thetas), strict=True)
    ]


def measure_all(study: Study, thetas: Float[Tensor, "n *seq d_model"]) -> list[Row]:
    """The KLs and the concept score of each vector on the training prompt, in one batch.

    The concept score is that of `steering.continuation_score`: steered minus unsteered, nats per token.
    """
    targets, unsteered, kls, scores = study.scored.targets[0], study.once(_unsteered_log_prob), [], []
    for logits in study.scored.logits(thetas):
        targets = targets.to(logits.device)
        kls.append(distances(study, logits[0].double().log_softmax(-1)))
        scores.append(target_log_probs(logits, targets).mean())
    return [
        {**columns, "concept_score": score - unsteered}
        for columns, score in zip(named(kls), fetched(scores), strict=True)
    ]


def _unsteered_log_prob(study: Study) -> float:
    (logits,) = study.scored.logits(torch.zeros_like(study.base)[None])
    return float(target_log_probs(logits, study.scored.targets[0]).mean())


def _to_radius(study: Study, norm: float) -> list[float]:
    ratio = study.radius / norm
    if abs(ratio - 1) < 1e-3:
        return []
    return [norm * ratio ** (step / _STEPS_TO_RADIUS) for step in range(1, _STEPS_TO_RADIUS + 1)]


def _knee(curve: list[Row]) -> Row:
    kls = torch.tensor([0.0] + [row["kl_from_unsteered"] for row in curve])
    return {**curve[int(kls.diff().diff().argmax())], "scale": "knee"}


def _halves(study: Study, vectors: Vectors, curves: list[list[Row]]) -> list[Row]:
    """The smallest norm of each vector with half of the unsteered KL; all are bisected in one batch."""
    goal = unsteered_kl(study) / 2
    brackets = [_bracket(curve, goal) for curve in curves]
    places = [i for i, bracket in enumerate(brackets) if bracket]
    low = torch.tensor([bracket[0] for bracket in brackets if bracket])
    # Rows of the smallest norms found so far that reach the goal.
    found = [bracket[1] for bracket in brackets if bracket]
    units = at_norm(vectors.theta[places], 1.0)
    for _ in range(_HALVINGS):
        middle = (low + torch.tensor([row["norm"] for row in found])) / 2
        for i, (norm, row) in enumerate(zip(middle.tolist(), _kls(study, units, middle), strict=True)):
            if row["kl_from_base"] > goal:
                low[i] = norm
            else:
                found[i] = {"norm": norm, **row}
    rows: list[Row] = [{"scale": "half", **dict.fromkeys(_COLUMNS), "concept_score": None} for _ in curves]
    for place, row in zip(places, found, strict=True):
        rows[place] |= {column: row[column] for column in _COLUMNS}
    return rows


def unsteered_kl(study: Study) -> float:
    """KL(P_unsteered‖P_base), nats."""
    return divergences(study, study.unsteered_log_probs)["kl_from_base"]


def _bracket(curve: list[Row], goal: float) -> tuple[float, Row] | None:
    """The norm of the last dose before the goal is reached, and the row of the first dose that reaches it."""
    low = 0.0
    for row in sorted(curve, key=lambda row: row["norm"]):
        if row["kl_from_base"] <= goal:
            return low, row
        low = row["norm"]
    return None


def _kls(study: Study, units: Float[Tensor, "n d_model"], norms: Float[Tensor, " n"]) -> list[dict[str, float]]:
    thetas = units * norms.to(units)[:, None]
    return named([distances(study, logits[0].double().log_softmax(-1)) for logits in study.prompt.logits(thetas)])
