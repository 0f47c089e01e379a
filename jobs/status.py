"""Print the progress of a run, from its storage alone, without a cluster or a model.

python jobs/status.py runs/RUN
python jobs/status.py s3://bucket/prefix/RUN
"""

import argparse
import sys

from rich.console import Console

from melbo_ray.cli import exit_code
from melbo_ray.errors import UserError
from melbo_ray.runs.lease import holder
from melbo_ray.runs.run_store import Run
from melbo_ray.study.display import status


def main() -> None:
    """Print the progress of the run on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run: a directory or fsspec URL")
    run = Run.open(parser.parse_args().run, patient=False)
    manifest = run.manifest()
    if manifest is None:
        raise UserError(f"no run at {run.storage.url}: expected run.json there")
    Console().print(status(manifest, run.fresh(), holder(run.storage)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
