"""Results of the self-checks of a run, as stored in the manifest and as summarised in one line."""

from typing import NotRequired

from typing_extensions import TypedDict  # pydantic asks for it below Python 3.12

EXACT, PLAIN = "exact", "plain way"


class Check(TypedDict):
    """The result of one check; errors are relative, except for `texts`, where `error` and `compared` count tokens."""

    error: float
    tolerance: float
    compared: int
    verdict: str  # `exact` or `plain way`
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
    """One line for each computation that is done the plain way, with the reason."""
    return [f"{name} by the plain way: {c['reason']}" for name, c in worst(checks).items() if c["verdict"] == PLAIN]


def _told(name: str, check: Check) -> str:
    same = f"{check['compared'] - check['error']:.0f} of {check['compared']} tokens"
    told = same if name == "texts" else f"{check['error']:.0e}".replace("e-0", "e-")
    return told if check["verdict"] == EXACT else f"{told} (the plain way)"


def _badness(check: Check) -> tuple[bool, float, int]:
    return check["verdict"] != EXACT, check["error"], -check["compared"]
