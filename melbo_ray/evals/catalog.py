"""The catalogue of evaluations: tables, scope and cost of each. It loads without torch.

The function of an evaluation is `run` in the module of its name in this folder.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from melbo_ray.errors import UserError
from melbo_ray.runs.work_unit import WHOLE

ALL = "all"
"""The value of the option `evals` that selects every evaluation but those of `WHY`."""
WHY = "why"
"""The value of the option `evals` that selects those that ask why the vectors do the same (docs/why.md)."""
CONTROLS = ("base", "unsteered")
"""The reference kinds, of one vector each with index 0; `unsteered` is the zero vector."""
FEW = 8
"""Number of random directions that `control` evaluates with the costlier evaluations."""
IN_PRESENCE = 200
"""Minimum number of random directions that `control` evaluates with `presence`; p = 0.05 needs at least 19."""


@dataclass(frozen=True)
class Evaluation:
    """The declaration of an evaluation.

    Attributes:
        name: as in the option `evals`.
        tables: the tables that receive its rows.
        scope: `vector` (run on batches of vectors of any kind as they are found) or `whole` (run once, on the whole
            chain after it has ended).
        of_every: for scope `vector`: run on every vector, regardless of the option `sample`.
        every_layer: for scope `vector`: it generates texts, so it runs all layers, not only those above the source.
        why: whether it is of the group `WHY`, which takes many passes a vector.
        passes: for scope `whole`: the number of vectors evaluated by each evaluation of scope `vector` as part of it,
            given the chain's length; None if the plan does not count it.
    """

    name: str
    tables: tuple[str, ...]
    scope: Literal["vector", "whole"] = "vector"
    of_every: bool = False
    every_layer: bool = False
    why: bool = False
    passes: Callable[[int], dict[str, int]] | None = None


def _of_control(chain: int) -> dict[str, int]:
    """Random directions, one per vector or a few, and the mean-difference direction."""
    few = dict.fromkeys(("generalization", "greedy", "generations", "dose"), min(chain, FEW) + 1)
    return {"kl": chain + 1, "presence": max(chain, IN_PRESENCE) + 1, **few}


def _of_rescaled(chain: int) -> dict[str, int]:
    """Every vector at one norm, while `kl` has two."""
    return {"kl": (chain + 1) // 2}


EVALUATIONS = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation("kl", ("kl",), of_every=True),
        Evaluation("greedy", ("generations",), of_every=True, every_layer=True),
        Evaluation("generations", ("generations",), every_layer=True),
        Evaluation("generalization", ("generalization",)),
        Evaluation("dose", ("dose",)),
        Evaluation("presence", ("presence",)),
        Evaluation("control", ("kl", "generalization", "generations", "dose", "presence"), WHOLE, passes=_of_control),
        Evaluation("shuffled", ("vectors", "summary", "kl", "generalization"), WHOLE),
        Evaluation("composition", ("composition",), WHOLE),
        Evaluation("geometry", ("geometry", "summary"), WHOLE),
        Evaluation("rescaled", ("kl",), WHOLE, passes=_of_rescaled),
        Evaluation("convergence", ("convergence",), why=True),
        Evaluation("mediation", ("mediation",), why=True),
        Evaluation("independence", ("independence",), why=True),
        Evaluation("frozen", ("frozen",), why=True),
        Evaluation("efficiency", ("efficiency",), why=True),
        Evaluation("privileged", ("privileged",), why=True),
        Evaluation("linear", ("linear", "summary"), WHOLE, why=True),
    )
}
PER_VECTOR = [name for name, evaluation in EVALUATIONS.items() if evaluation.scope == "vector"]
SAMPLED = [name for name in PER_VECTOR if not EVALUATIONS[name].of_every]
"""The evaluations of scope `vector` that the option `sample` limits."""


def resolve(names: Iterable[str]) -> list[str]:
    """The evaluations named by the option `evals`, without duplicates.

    Raises:
        UserError: an unknown name, with the nearest known one.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in (ALL, WHY, *EVALUATIONS):
            near = difflib.get_close_matches(name, [*EVALUATIONS, WHY], n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"expected {ALL}, or some of {', '.join([*EVALUATIONS, WHY])}"
            )
            raise UserError(f"no evaluation {name!r}: {hint}")
        group = [own for own, evaluation in EVALUATIONS.items() if evaluation.why == (name == WHY)]
        found |= dict.fromkeys(group if name in (ALL, WHY) else [name])
    return list(found)
