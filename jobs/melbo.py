"""`melbo-ray bases`, for `ray job submit`: `python jobs/melbo.py --help` lists the options."""

import sys

from melbo_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bases", *sys.argv[1:]]))
