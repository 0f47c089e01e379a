"""`melbo-ray sweep`, for `ray job submit`: `python jobs/sweep.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
