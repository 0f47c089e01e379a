"""`melbo-ray import`, for `ray job submit`: `python jobs/import.py --help` lists the options."""

import importlib
import sys

from melbo_ray.cli import exit_code

if __name__ == "__main__":
    command = importlib.import_module("melbo_ray.commands.import")  # a keyword cannot be imported by name
    sys.exit(exit_code(lambda: command.main(sys.argv[1:])))
