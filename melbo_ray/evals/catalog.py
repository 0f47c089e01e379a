"""The catalogue of evaluations: tables, scope and cost of each. It loads without torch.

The function of an evaluation is `run` in the module of its name in this folder.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from melbo_ray.errors import UserError
from melbo_ray.runs.work_unit import WHOLE, of_chain

ALL = "all"
"""The value of the option `evals` that selects every evaluation but those of `WHY`."""
WHY = "why"
"""The value of the option `evals` that selects those that ask why the vectors do the same (docs/why.md)."""
CONTROLS = ("base", "unsteered")
"""The reference kinds, of one vector each with index 0; `unsteered` is the zero vector."""
FEW = 8
"""Number of random directions that `control` evaluates with the costlier evaluations."""
MANY = 64
"""Maximum number of vectors in the sample of the evaluations of a whole chain that ask why."""
IN_PRESENCE = 200
"""Minimum number of random directions that `control` evaluates with `presence`; p = 0.05 needs at least 19."""
SUBSETS = (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
"""Sizes of the subsets that `composition` combines."""
RANDOM_SUBSETS = 2
"""Number of random subsets of each size below the chain's length, besides the first vectors."""
COMPOSED = ("own", "typical", "ablated")
"""The scales of `composition`."""
BLOCKS = 128
"""Number of blocks of rows in which `jacobian` and `hessian` find a matrix."""
SHUFFLED = 8
"""Maximum number of vectors that `shuffled` finds."""
# Vectors per unit of a share that takes no pass through the model.
_CHEAP = 64
# Norms of a direction at which `dose` computes logits.
_NORMS = 17


@dataclass(frozen=True)
class Share:
    """A share of the evaluation of a whole chain: items, which are evaluated in batches, each of them a unit.

    Attributes:
        name: kind of its units and of its failures.
        items: the items, given the chain's length: indices of its rows, or 0 if all rows are made at once.
        of_vectors: whether the items are indices of the chain's vectors.
        batch: items per unit; by default the option `eval_batch`.
        of_length: whether its rows depend on the chain's length.
        settled: length of the chain from which on the items are final; by default its units wait for the chain's end.
        in_turn: whether a unit, of the option `block` items, needs the rows of the unit before it.
        after: an evaluation whose rows it needs, of the whole chain.
    """

    name: str
    items: Callable[[int], Sequence[int]]
    of_vectors: bool = False
    batch: int | None = None
    of_length: bool = False
    settled: int | None = None
    in_turn: bool = False
    after: str | None = None

    def kind(self, chain: int) -> str:
        """The kind of its units for a chain of this length."""
        return of_chain(self.name, chain) if self.of_length else self.name

    def size(self, eval_batch: int, block: int) -> int:
        """Items per unit."""
        return block if self.in_turn else self.batch or eval_batch


@dataclass(frozen=True)
class Evaluation:
    """The declaration of an evaluation.

    Attributes:
        name: as in the option `evals`.
        tables: the tables that receive its rows.
        scope: `vector` (run on batches of vectors of any kind as they are found) or `whole` (run on the chain as a
            whole, mostly after it has ended, in the units of its `shares`).
        of_every: for scope `vector`: run on every vector, regardless of the option `sample`.
        every_layer: for scope `vector`: it generates texts, so it runs all layers, not only those above the source.
        shares: for scope `whole`: what it is cut into.
        why: whether it is of the group `WHY`, which takes many passes a vector.
        passes: for scope `whole`: the number of vectors evaluated by each evaluation of scope `vector` as part of it,
            or in as many passes, given the chain's length; None if the plan does not count it.
        searched: for scope `whole`: the number of vectors that it finds as a chain does, given the chain's length.
    """

    name: str
    tables: tuple[str, ...]
    scope: Literal["vector", "whole"] = "vector"
    of_every: bool = False
    every_layer: bool = False
    shares: tuple[Share, ...] = ()
    why: bool = False
    passes: Callable[[int], dict[str, int]] | None = None
    searched: Callable[[int], int] = lambda chain: 0

    def share(self, name: str) -> Share:
        """The share of this name."""
        return next(share for share in self.shares if share.name == name)


def evenly(total: int, count: int) -> list[int]:
    """At most `count` evenly spread positions among `total`, including the first and the last."""
    if total <= count:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _once(chain: int) -> range:
    return range(1)


def _every(chain: int) -> range:
    return range(1, chain + 1)


def _of_few(chain: int) -> list[int]:
    return [1 + place for place in evenly(chain, FEW)]


def _blocks(chain: int) -> range:
    return range(BLOCKS)


def sampled(chain: int) -> list[int]:
    """The indices of at most `MANY` vectors of a chain of this length, spread evenly."""
    return [1 + place for place in evenly(chain, MANY)]


def _of_subsets(chain: int) -> range:
    sizes = [size for size in SUBSETS if size <= chain]
    return range(len(COMPOSED) * sum(1 + RANDOM_SUBSETS * (size < chain) for size in sizes))


def _of_shuffled(chain: int) -> range:
    return range(1, min(SHUFFLED, chain) + 1)


def _of_control(chain: int) -> dict[str, int]:
    """Random directions, one per vector or a few, and the mean-difference direction."""
    few = dict.fromkeys(("generalization", "greedy", "generations", "dose"), min(chain, FEW) + 1)
    return {"kl": chain + 1, "presence": max(chain, IN_PRESENCE) + 1, **few}


def _of_rescaled(chain: int) -> dict[str, int]:
    """Every vector at one norm, while `kl` has two."""
    return {"kl": (chain + 1) // 2}


def _of_composed(chain: int) -> dict[str, int]:
    """A text of every row, and its logits along the continuations, as `dose` has them at 17 norms; its null's, too."""
    rows = len(_of_subsets(chain))
    return {"greedy": rows, "dose": math.ceil(2 * rows / _NORMS)}


def _of_nulls(chain: int) -> dict[str, int]:
    return dict.fromkeys(("kl", "generalization"), len(_of_shuffled(chain)))


def _of_none(chain: int) -> dict[str, int]:
    """None: what it needs of the model has been measured by `kl`."""
    return {}


_CONTROL = (
    Share("random", _every, of_vectors=True),
    Share("spread", _of_few, of_vectors=True, batch=1, of_length=True),
    Share("more", _once, of_length=True),
    Share("contrast", _once),
)
_GEOMETRY = (
    Share("chain", _every, of_vectors=True, batch=_CHEAP),
    Share("summary", _once, of_length=True, after="kl"),
)
_RESCALED = (Share("chain", _every, of_vectors=True, of_length=True),)
_COMPOSITION = (Share("subsets", _of_subsets, of_length=True),)
_FREQUENCY = (Share("concept", _once, settled=1),)
_SHUFFLED = (Share("shuffled", _of_shuffled, settled=SHUFFLED, in_turn=True),)
_JACOBIAN = (Share("block", _blocks, batch=4),)
_HESSIAN = (Share("block", _blocks, batch=1),)
_LINEAR = (
    *(
        Share(name, sampled, of_vectors=True, of_length=True, after="jacobian")
        for name in ("chain", "linear", "random")
    ),
    Share("spectrum", _once, of_length=True, after="jacobian"),
)
_INDEPENDENCE = (Share("chain", sampled, of_vectors=True, of_length=True),)
_CURVATURE = (
    Share("chain", sampled, of_vectors=True, of_length=True, after="hessian"),
    Share("spectrum", _once, of_length=True, after="hessian"),
)
_NULLS = ("kl", "generalization", "generations", "dose", "presence")

EVALUATIONS = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation("kl", ("kl",), of_every=True),
        Evaluation("greedy", ("generations",), of_every=True, every_layer=True),
        Evaluation("generations", ("generations",), every_layer=True),
        Evaluation("generalization", ("generalization",)),
        Evaluation("dose", ("dose",)),
        Evaluation("presence", ("presence",)),
        Evaluation("control", _NULLS, WHOLE, shares=_CONTROL, passes=_of_control),
        Evaluation(
            "shuffled",
            ("vectors", "summary", "kl", "generalization"),
            WHOLE,
            shares=_SHUFFLED,
            passes=_of_nulls,
            searched=lambda chain: len(_of_shuffled(chain)),
        ),
        Evaluation("composition", ("composition",), WHOLE, shares=_COMPOSITION, passes=_of_composed),
        Evaluation("geometry", ("geometry", "summary"), WHOLE, shares=_GEOMETRY, passes=_of_none),
        Evaluation("frequency", ("summary",), WHOLE, shares=_FREQUENCY),
        Evaluation("rescaled", ("kl",), WHOLE, shares=_RESCALED, passes=_of_rescaled),
        Evaluation("convergence", ("convergence", "token_cosines"), why=True),
        Evaluation("mediation", ("mediation",), why=True),
        Evaluation("independence", ("independence",), WHOLE, shares=_INDEPENDENCE, why=True),
        Evaluation("frozen", ("frozen",), why=True),
        Evaluation("efficiency", ("efficiency",), why=True),
        Evaluation("privileged", ("privileged",), why=True),
        Evaluation("jacobian", ("jacobian",), WHOLE, shares=_JACOBIAN, why=True),
        Evaluation("linear", ("linear", "summary"), WHOLE, shares=_LINEAR, why=True),
        Evaluation("gain", ("gain",), why=True),
        Evaluation("hessian", ("hessian",), WHOLE, shares=_HESSIAN, why=True),
        Evaluation("curvature", ("curvature", "summary"), WHOLE, shares=_CURVATURE, why=True),
    )
}
PER_VECTOR = [name for name, evaluation in EVALUATIONS.items() if evaluation.scope == "vector"]
SAMPLED = [name for name in PER_VECTOR if not EVALUATIONS[name].of_every]
"""The evaluations of scope `vector` that the option `sample` limits."""


def resolve(names: Iterable[str]) -> list[str]:
    """The evaluations named by the option `evals`, without duplicates, each preceded by those that it needs.

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
        for each in group if name in (ALL, WHY) else [name]:
            needed = [share.after for share in EVALUATIONS[each].shares if share.after]
            found |= dict.fromkeys([*needed, each])
    return list(found)
