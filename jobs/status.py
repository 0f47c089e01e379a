"""`melbo-ray status`, for `ray job submit`: `python jobs/status.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["status", *sys.argv[1:]]))
