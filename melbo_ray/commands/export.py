"""Write vectors of a run as files for other tools, each with a sidecar that says what they are and should do.

melbo-ray export --run runs/RUN --index 1-24 --format gguf --out vectors
melbo-ray export --run s3://bucket/prefix/RUN --concept code --index 0,129 --format safetensors --out vectors
"""

from melbo_ray.cli import Parser
from melbo_ray.formats.writing import FORMATS
from melbo_ray.study.export import export, numbers


def main(args: list[str]) -> None:
    """Write the files, and print their paths."""
    parser = Parser("export", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument("--concept", help="name of the concept; not needed in a run of one concept")
    parser.add_argument("--index", required=True, help="vectors, such as 129, 1-24 or 0,3,7-9; 0 is the base")
    parser.add_argument("--format", required=True, help=f"format: {', '.join(FORMATS)}")
    parser.add_argument("--out", required=True, help="directory for the files and their sidecars")
    options = parser.parse_args(args)
    for path in export(options.run, options.concept, numbers(options.index), options.format, options.out):
        print(path)
