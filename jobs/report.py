"""`melbo-ray report`, for `ray job submit`: `python jobs/report.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
