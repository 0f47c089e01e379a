"""Write the report of a run: one HTML file that opens without a network, in the run's own storage.

python jobs/report.py --run runs/RUN
python jobs/report.py --run s3://bucket/prefix/RUN
python jobs/report.py --run runs/RUN --figures figures    # every figure as PNG and SVG for papers, too
"""

import argparse
import sys

from melbo_ray.config import UserError
from melbo_ray.report import export, render


def main() -> int:
    """Render, and say where the report is; 2 after one line that says what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="directory or fsspec URL of the run")
    parser.add_argument("--figures", metavar="DIR", help="directory for the figures; needs kaleido and a Chrome")
    options = parser.parse_args()
    try:
        print(f"report:  {render(options.run)}")
        for path in export(options.run, options.figures) if options.figures else ():
            print(f"figure:  {path}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
