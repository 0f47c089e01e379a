"""Print the progress of a run, from its storage alone, without a cluster or a model.

melbo-ray status runs/RUN
melbo-ray status s3://bucket/prefix/RUN
"""

from rich.console import Console

from melbo_ray.cli import Parser
from melbo_ray.errors import UserError
from melbo_ray.runs.lease import holder
from melbo_ray.runs.run_store import Run
from melbo_ray.study.display import status


def main(args: list[str]) -> None:
    """Print the progress of the run."""
    parser = Parser("status", __doc__)
    parser.add_argument("run", help="folder of the run: a directory or fsspec URL")
    run = Run.open(parser.parse_args(args).run, patient=False)
    manifest = run.manifest()
    if manifest is None:
        raise UserError(f"no run at {run.storage.url}: expected run.json there")
    Console().print(status(manifest, run.fresh(), holder(run.storage)))
