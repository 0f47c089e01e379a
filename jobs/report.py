"""Write the report of a run: one HTML file that opens without a network, in the run's own storage.

python jobs/report.py --run runs/RUN
python jobs/report.py --run s3://bucket/prefix/RUN
python jobs/report.py --run runs/RUN --figures figures    # every figure as PNG and SVG for papers, too
"""

import argparse
import sys

from melbo_ray.cli import exit_code
from melbo_ray.report.page import export, render


def main() -> None:
    """Write the report of the run that the command line names, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run's folder: a directory or fsspec URL")
    parser.add_argument("--figures", metavar="DIR", help="directory for the figures; needs kaleido and a Chrome")
    options = parser.parse_args()
    print(f"report:  {render(options.run)}")
    for path in export(options.run, options.figures) if options.figures else ():
        print(f"figure:  {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
