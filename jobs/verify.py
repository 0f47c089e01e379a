"""`melbo-ray verify`, for `ray job submit`: `python jobs/verify.py --help` lists the options."""

import sys

from melbo_ray.cli import exit_code
from melbo_ray.commands.verify import main

if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
