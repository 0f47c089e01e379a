"""`melbo-ray run`, for `ray job submit`: `python jobs/ortho.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
