"""The list of commands: what each does, and which extras of the package it needs."""

import importlib.util
from dataclasses import dataclass

from melbo_ray.errors import UserError

EXTRAS = {"cluster": ("ray", "s3fs"), "report": ("plotly",)}
"""The modules that an extra of the package installs and the base install lacks."""


@dataclass(frozen=True)
class Command:
    """A command, whose module `melbo_ray.commands.<name>` is imported when it runs.

    Attributes:
        told: one line for the list of commands.
        extras: names in `EXTRAS` without which it cannot run.
    """

    told: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "run": Command("a study: base, chain, evaluations, report; started or resumed", ("cluster",)),
    "sweep": Command("a grid of studies as one job, compared", ("cluster",)),
    "bases": Command("base vectors alone, with what the model writes under each", ("cluster",)),
    "evaluate": Command("more evaluations of an existing run", ("cluster",)),
    "report": Command("the report of a run, and its figures for papers", ("report",)),
    "status": Command("where a run stands, from its storage alone"),
    "plan": Command("what a study will take: memory, GPUs, time, storage"),
    "export": Command("vectors of a run as files for other tools"),
    "import": Command("a run made of a foreign chain"),
    "verify": Command("an exported file, replayed on a model"),
    "steer": Command("texts under a vector of a run, its base and none, side by side"),
    "play": Command("a local page: pick a vector, slide its norm, read what the model writes"),
}


def require(extra: str, command: str) -> None:
    """Check that the modules of an extra can be imported.

    Raises:
        UserError: one is missing.
    """
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{command} needs {' and '.join(missing)}: pip install 'melbo-ray[{extra}]'")
