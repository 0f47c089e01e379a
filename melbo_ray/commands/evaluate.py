"""Evaluate the vectors of a run. Results that exist are kept; failed evaluations are retried.

melbo-ray evaluate --run runs/RUN --evals kl,presence
melbo-ray evaluate --run runs/RUN --evals dose --sample 64        # 64 vectors, evenly spread over the chain
melbo-ray evaluate --run s3://bucket/prefix/RUN --evals presence --eval-gpus 0.25 --max-evaluators 8
"""

from rich.console import Console

from melbo_ray.cli import Parser
from melbo_ray.commands.run import report
from melbo_ray.evals.catalog import ALL, EVALUATIONS, WHY
from melbo_ray.study.preflight import recheck
from melbo_ray.study.runner import run
from melbo_ray.study.summary import epilogue


def main(args: list[str]) -> None:
    """Run the requested evaluations on an existing run, print its summary and rewrite its report."""
    parser = Parser("evaluate", __doc__)
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
    options = {name: value for name, value in vars(parser.parse_args(args)).items() if value is not None}
    console = Console()
    done = run(recheck(options.pop("run"), options), console, chains=False)
    epilogue(console, *done)
    console.print(f"report:  {report(done[0].storage.url)}", highlight=False, soft_wrap=True)
