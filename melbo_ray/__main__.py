"""`melbo-ray COMMAND …`, which is also `python -m melbo_ray COMMAND …`."""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from melbo_ray.cli import exit_code
from melbo_ray.commands.registry import COMMANDS, require
from melbo_ray.errors import UserError


def main(args: Sequence[str] | None = None) -> int:
    """Run the command that the arguments (by default the process's) begin with; returns its exit code."""
    given = list(sys.argv[1:] if args is None else args)
    return exit_code(lambda: _run(given))


def _run(args: list[str]) -> None:
    name, *rest = args or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return
    if name == "--version":
        print(f"melbo-ray {importlib.metadata.version('melbo-ray')}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"no command {name!r}: {f'did you mean {near[0]}?' if near else 'expected ' + _names()}")
    # Help needs what the command needs: options are listed by the code that reads them.
    for extra in COMMANDS[name].extras:
        require(extra, f"melbo-ray {name}")
    importlib.import_module(f"melbo_ray.commands.{name}").main(rest)


def _names() -> str:
    return ", ".join(COMMANDS)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.told}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: melbo-ray COMMAND [options]",
            "",
            "How many different directions in a language model do the same thing?",
            "",
            *lines,
            "",
            "`melbo-ray COMMAND --help` lists its options.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
