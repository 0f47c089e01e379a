"""Evaluate the vectors of a run. Results that exist are kept; failed evaluations are retried.

python jobs/evaluate.py --run runs/RUN --evals kl,presence
python jobs/evaluate.py --run runs/RUN --evals dose --sample 64        # 64 vectors, evenly spread over the chain
python jobs/evaluate.py --run s3://bucket/prefix/RUN --evals presence --eval-gpus 0.25 --max-evaluators 8
"""

import argparse
import sys

from rich.console import Console

from melbo_ray.cli import exit_code
from melbo_ray.evals.catalog import ALL, EVALUATIONS, WHY
from melbo_ray.report.page import render
from melbo_ray.study.preflight import recheck
from melbo_ray.study.runner import run
from melbo_ray.study.summary import epilogue


def main() -> None:
    """Run the requested evaluations on an existing run, print its summary and rewrite its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument(
        "--evals", help=f"evaluations to add, comma-separated: {ALL}, {WHY}, or names: {', '.join(EVALUATIONS)}"
    )
    parser.add_argument(
        "--sample", type=int, help="number of evenly spread vectors for per-vector evaluations other than kl and greedy"
    )
    parser.add_argument("--eval-batch", type=int, help="number of vectors per evaluation unit")
    parser.add_argument("--eval-gpus", type=float, help="GPUs per evaluator")
    parser.add_argument("--min-evaluators", type=int, help="minimum number of evaluators")
    parser.add_argument("--max-evaluators", type=int, help="maximum number of evaluators")
    parser.add_argument("--device", help="device: auto, cpu, or cuda")
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    console = Console()
    done = run(recheck(options.pop("run"), options), console, chains=False)
    epilogue(console, *done)
    console.print(f"report:  {render(done[0].storage.url)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
