"""The evaluations by name: what each writes, what it is asked of, what it takes. Loads without torch.

An evaluation of that name is `run` of the module of that name beside this one.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from melbo_ray.errors import UserError
from melbo_ray.runs.work_unit import WHOLE

ALL = "all"
"""What the option `evals` says for every evaluation."""
CONTROLS = ("base", "unsteered")
"""The kinds of one vector each, index 0, that every vector is compared with; `unsteered` is the vector 0."""
FEW = 8
"""Random directions that `control` takes through the costlier evaluations."""
IN_PRESENCE = 200
"""Those that it takes through `presence` at least: of fewer than 20 none could say p = 0.05."""


@dataclass(frozen=True)
class Evaluation:
    """What is known of an evaluation before it runs.

    Attributes:
        name: as in the option `evals`.
        tables: the tables it writes rows of.
        scope: `vector` (asked of any batch of vectors of any kind, as they appear) or `whole` (asked once, of all the
            vectors of kind `chain` together, at the end).
        of_every: of scope `vector`: asked of every vector, whatever the option `sample` says.
        every_layer: of scope `vector`: it writes texts, so it runs every layer, not those above the source layer alone.
        passes: of scope `whole`: how many vectors it takes through each evaluation of scope `vector`, of a chain of so
            many; None where the plan does not count it.
    """

    name: str
    tables: tuple[str, ...]
    scope: Literal["vector", "whole"] = "vector"
    of_every: bool = False
    every_layer: bool = False
    passes: Callable[[int], dict[str, int]] | None = None


def _of_control(chain: int) -> dict[str, int]:
    """Random directions, one for each vector or a few; and the mean-difference direction."""
    few = dict.fromkeys(("generalization", "greedy", "generations", "dose"), min(chain, FEW) + 1)
    return {"kl": chain + 1, "presence": max(chain, IN_PRESENCE) + 1, **few}


def _of_rescaled(chain: int) -> dict[str, int]:
    """Each vector at one norm, where `kl` has two."""
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
    )
}
PER_VECTOR = [name for name, evaluation in EVALUATIONS.items() if evaluation.scope == "vector"]
SAMPLED = [name for name in PER_VECTOR if not EVALUATIONS[name].of_every]
"""Those of single vectors that the option `sample` limits."""


def resolve(names: Iterable[str]) -> list[str]:
    """The evaluations that the option `evals` names, each once.

    Raises:
        UserError: a name that is none of theirs, with the nearest there is.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in (ALL, *EVALUATIONS):
            near = difflib.get_close_matches(name, EVALUATIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected {ALL}, or some of {', '.join(EVALUATIONS)}"
            raise UserError(f"no evaluation {name!r}: {hint}")
        found |= dict.fromkeys(EVALUATIONS if name == ALL else [name])
    return list(found)
