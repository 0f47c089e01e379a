"""Write the report of a run into its folder: one self-contained HTML file.

python jobs/report.py --run runs/RUN
python jobs/report.py --run s3://bucket/prefix/RUN
python jobs/report.py --run runs/RUN --figures figures    # also every figure as PNG and SVG
"""

import argparse
import sys

from melbo_ray.cli import exit_code
from melbo_ray.report.page import export, render


def main() -> None:
    """Write the report of the run on the command line, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument(
        "--figures", metavar="DIR", help="directory for figures as PNG and SVG; needs kaleido and Chrome"
    )
    options = parser.parse_args()
    print(f"report:  {render(options.run)}")
    for path in export(options.run, options.figures) if options.figures else ():
        print(f"figure:  {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
