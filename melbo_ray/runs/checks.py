"""Results of the self-checks of a run, as stored in the manifest and as summarised in one line."""

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

EXACT, PLAIN, ROUNDED = "exact", "plain way", "rounded"


class Check(TypedDict):
    """The result of one check; errors are relative, except for two.

    Of `texts`, `error` and `compared` count tokens. Of `products`, `error` is that of a KL, nats, `tolerance` the KL
    of the unsteered model, and `compared` counts KLs.
    """

    error: float
    tolerance: float
    compared: int
    verdict: str  # `exact`, `plain way` or `rounded`
    reason: str
    role: NotRequired[str]
    host: NotRequired[str]


Checks = dict[str, dict[str, dict[str, Check]]]
"""Checks by role of the worker (`chain`, `evaluator`), host and name."""


def merge(checks: Checks, role: str, host: str, found: dict[str, Check]) -> None:
    """Add a worker's checks; of several workers of one role on one host the worst result is kept."""
    kept = checks.setdefault(role, {}).setdefault(host, {})
    for name, check in found.items():
        kept[name] = max(kept.get(name, check), check, key=_badness)


def worst(checks: Checks) -> dict[str, Check]:
    """The worst result of each check over all workers, with its `role` and `host`."""
    found: dict[str, Check] = {}
    for role, hosts in checks.items():
        for host, by_name in hosts.items():
            for name, check in by_name.items():
                here: Check = {**check, "role": role, "host": host}
                found[name] = max(found.get(name, here), here, key=_badness)
    return found


def line(checks: Checks) -> str:
    """The worst result of each check in one line; empty if nothing was checked."""
    return ", ".join(f"{name} {_told(name, check)}" for name, check in worst(checks).items())


def reasons(checks: Checks) -> list[str]:
    """One line for each computation that is done the plain way or rounded, with the reason."""
    told = {PLAIN: "{} by the plain way: {}", ROUNDED: "{}: {}"}
    return [told[c["verdict"]].format(name, c["reason"]) for name, c in worst(checks).items() if c["verdict"] in told]


def _told(name: str, check: Check) -> str:
    same = f"{check['compared'] - check['error']:.0f} of {check['compared']} tokens"
    told = same if name == "texts" else f"{check['error']:.0e}".replace("e-0", "e-")
    return told + {EXACT: "", PLAIN: " (the plain way)", ROUNDED: " nats"}[check["verdict"]]


def _badness(check: Check) -> tuple[bool, float, int]:
    return check["verdict"] != EXACT, check["error"], -check["compared"]
