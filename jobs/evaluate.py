"""Evaluate the vectors that a run has found, without doing again what is there; what has failed is tried once more.

python jobs/evaluate.py --run runs/RUN --evals kl,presence
python jobs/evaluate.py --run runs/RUN --evals dose --sample 64        # of 64 vectors, evenly spread over the chain
python jobs/evaluate.py --run s3://bucket/prefix/RUN --evals presence --eval-gpus 0.25 --max-evaluators 8
"""

import argparse
import sys

from rich.console import Console

from melbo_ray.cli import exit_code
from melbo_ray.evals.catalog import ALL, EVALUATIONS
from melbo_ray.report.page import render
from melbo_ray.study.preflight import recheck
from melbo_ray.study.runner import run
from melbo_ray.study.summary import epilogue


def main() -> None:
    """Run the evaluations that the command line asks for on an existing run; its report anew and summary at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="the run's folder: a directory or fsspec URL")
    parser.add_argument(
        "--evals", help=f"evaluations to add, comma-separated: {ALL}, or some of {', '.join(EVALUATIONS)}"
    )
    parser.add_argument("--sample", type=int, help="vectors asked, evenly spread, of all but kl, greedy, whole chains")
    parser.add_argument("--eval-batch", type=int, help="vectors in one evaluation batch")
    parser.add_argument("--eval-gpus", type=float, help="GPUs an evaluation actor takes")
    parser.add_argument("--min-evaluators", type=int, help="evaluation actors kept at least")
    parser.add_argument("--max-evaluators", type=int, help="evaluation actors at most")
    parser.add_argument("--device", help="auto, cpu, or cuda")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    console = Console()
    done = run(recheck(options.pop("run"), options), console, chains=False)
    epilogue(console, *done)
    console.print(f"report:  {render(done[0].storage.url)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
