"""`melbo-ray evaluate`, for `ray job submit`: `python jobs/evaluate.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
