"""The command line: options, error messages and exit codes."""

import argparse
import difflib
import re
import signal
import sys
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from melbo_ray.config import Config
from melbo_ray.errors import Terminated, UserError


def exit_code(main: Callable[[], object]) -> int:
    """Run a command's main function in the main thread and return its exit code.

    The code is 0; or, after one line on stderr, 2 for a `UserError`, 130 for Ctrl-C, or 143 for SIGTERM.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        print(f"error: {flags(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _terminate(*_: object) -> None:
    raise Terminated


def flags(message: str) -> str:
    """The message with each option name in backticks replaced by its command-line flag."""
    return re.sub(
        "`([a-z_]+)`", lambda found: _flag(found[1]) if found[1] in Config.model_fields else found[0], message
    )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """The options of a command other than those that take a `Config`.

    Args:
        command: its name, after `melbo-ray`.
        described: its help, with examples.
    """

    def __init__(self, command: str, described: str | None) -> None:
        shown = argparse.RawDescriptionHelpFormatter
        super().__init__(f"melbo-ray {command}", description=described, formatter_class=shown, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage."""
        raise UserError(f"{message}; {self.prog} --help lists the options")


def parse(description: str, args: list[str], program: str = "melbo-ray run") -> Config:
    """The configuration of a command line: the options override the TOML file of `--config`, which overrides defaults.

    Raises:
        UserError: an unknown option, with the nearest known name, or an invalid value.
        SystemExit: after `--help`.
    """
    described = {"__doc__": description, "__module__": __name__, "model_config": {"cli_prog_name": program}}
    command = type("Config", (Config,), described)
    try:
        return Config(**CliApp.run(command, cli_args=args, **_read_toml(args)).model_dump(exclude_unset=True))
    except ValidationError as error:
        raise UserError(_describe(error)) from None
    except SettingsError as error:
        raise UserError(_suggest(str(error).removeprefix("error parsing CLI: "))) from None


def _read_toml(args: list[str]) -> dict[str, Any]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(args)[0].config
    except argparse.ArgumentError as error:
        raise UserError(f"--config: {error.message}") from None
    return {} if path is None else read_options(path)


def read_options(name: str) -> dict[str, Any]:
    """The options set by the preset or TOML file `name`, by their names in `Config`.

    Raises:
        UserError: no such preset or file, or invalid TOML.
    """
    presets = {
        Path(f.name).stem: f for f in (files("melbo_ray") / "concepts/presets").iterdir() if f.name.endswith(".toml")
    }
    if name not in presets and not name.endswith(".toml") and not Path(name).exists():
        raise UserError(f"no preset {name!r}: expected one of {', '.join(sorted(presets))}, or the path of a TOML file")
    try:
        text = presets.get(name, Path(name)).read_text("utf-8")
        return {name.replace("-", "_"): value for name, value in tomllib.loads(text).items()}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"cannot read the configuration {name!r}: {error}") from None


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    # If an option accepts several types, the rest of `loc` names one of them.
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return _suggest(f"unknown option {name!r}")
    message = first["msg"].removeprefix("Value error, ")
    return f"{_flag(name)} is {first['input']!r}: {message}" if name else message


def _suggest(message: str) -> str:
    """The message, with the nearest known option if it names an unknown one."""
    for word in re.findall(r"[\w-]+", message):
        near = difflib.get_close_matches(word.strip("-").replace("-", "_"), Config.model_fields, n=1, cutoff=0.75)
        if near and near[0] != word.strip("-").replace("-", "_"):
            return f"{message}; did you mean {_flag(near[0])}?"
    return f"{message}; --help lists the options"
