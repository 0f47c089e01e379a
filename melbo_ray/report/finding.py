"""A finding: what a measurement says of a hypothesis."""

from dataclasses import dataclass

SUPPORTS, AGAINST, UNDECIDED, LEFT_OUT = "supports", "speaks against", "does not decide", "left out"

FEWEST = 8
"""Figures of fewer vectors are told, but decide nothing."""

Measured = tuple[str, str]
"""A plain sentence with the figures and their null, and the verdict."""


@dataclass(frozen=True)
class Finding:
    """What a measurement says of a hypothesis.

    Attributes:
        hypothesis: the hypothesis.
        measured: a plain sentence with the figures and their null; or the reason why there are none.
        verdict: `supports`, `speaks against`, `does not decide`, or `left out`.
    """

    hypothesis: str
    measured: str
    verdict: str
