"""Find a chain of orthogonal steering vectors that copy the effect of one base vector, and evaluate each of them.

melbo-ray run --config smollm2         # the embedded model, on a prompt that suits it
melbo-ray run --model Qwen/Qwen1.5-1.8B-Chat --radius 7 --num-vectors 1558 --storage s3://bucket/prefix
melbo-ray run --model Qwen/Qwen1.5-1.8B-Chat --num-vectors 1558 --plan     # print the estimate and exit
melbo-ray run --run-id RUN                 # the same command resumes an interrupted run
RAY_ADDRESS=auto melbo-ray run             # on the Ray cluster of this machine
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/ortho.py --storage s3://bucket/prefix
"""

from rich.console import Console

from melbo_ray.cli import parse
from melbo_ray.commands.registry import require
from melbo_ray.errors import UserError
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.study.planner import plan
from melbo_ray.study.preflight import check
from melbo_ray.study.runner import run
from melbo_ray.study.summary import epilogue


def main(args: list[str]) -> None:
    """Run a study, print its summary and write its report."""
    console = Console()
    checked = check(parse(f"{__doc__}\nEvaluations: {', '.join(EVALUATIONS)}.", args, "melbo-ray run"))
    if checked.config.plan:
        console.print(plan(checked))
        return
    done = run(checked, console)
    epilogue(console, *done)
    console.print(f"report:  {report(done[0].storage.url)}", highlight=False, soft_wrap=True)


def report(url: str) -> str:
    """Where the run's report was written; without Plotly, what to install: the results are whole without it."""
    try:
        require("report", f"melbo-ray report --run {url}")
    except UserError as missing:
        return str(missing)
    from melbo_ray.report.page import render

    return render(url)
