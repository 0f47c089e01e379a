# ruff: noqa: N999 - named like its command, a keyword
"""Make a run of vectors that another tool found, so that `melbo-ray evaluate` takes them through every evaluation.

melbo-ray import --base chain.pt --model Qwen/Qwen1.5-1.8B-Chat --concepts code --run-id theirs
melbo-ray evaluate --run runs/theirs --evals all
The base is the first row of the file, or row --base-index; the other rows are the chain.
"""

from melbo_ray.cli import parse
from melbo_ray.study.imported import import_run


def main(args: list[str]) -> None:
    """Store the vectors as a run, and print its folder."""
    print(import_run(parse(__doc__ or "", args, "melbo-ray import")).storage.url)
