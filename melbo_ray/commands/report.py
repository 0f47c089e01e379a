"""Write the report of a run into its folder: one self-contained HTML file.

melbo-ray report --run runs/RUN
melbo-ray report --run s3://bucket/prefix/RUN
melbo-ray report --run runs/RUN --figures figures    # also every figure as PNG and SVG
"""

from melbo_ray.cli import Parser
from melbo_ray.report.page import export, render


def main(args: list[str]) -> None:
    """Write the report, and print its path."""
    parser = Parser("report", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument(
        "--figures", metavar="DIR", help="directory for figures as PNG and SVG; needs kaleido and Chrome"
    )
    options = parser.parse_args(args)
    print(f"report:  {render(options.run)}")
    for path in export(options.run, options.figures) if options.figures else ():
        print(f"figure:  {path}")
