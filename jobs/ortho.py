"""Find a chain of orthogonal steering vectors that copy the effect of one base vector, and evaluate each of them.

python jobs/ortho.py --config smollm2         # the embedded model, on a prompt that suits it (`make run`)
python jobs/ortho.py --model Qwen/Qwen1.5-1.8B-Chat --radius 7 --num-vectors 1558 --storage s3://bucket/prefix
python jobs/ortho.py --model Qwen/Qwen1.5-1.8B-Chat --num-vectors 1558 --plan     # print the estimate and exit
python jobs/ortho.py --run-id RUN                 # the same command resumes an interrupted run
RAY_ADDRESS=auto python jobs/ortho.py             # on the Ray cluster of this machine
ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/ortho.py --storage s3://bucket/prefix
"""

import sys

from rich.console import Console

from melbo_ray.cli import exit_code, parse
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.report.page import render
from melbo_ray.study.planner import plan
from melbo_ray.study.preflight import check
from melbo_ray.study.runner import run
from melbo_ray.study.summary import epilogue


def main() -> None:
    """Run a study with the options of the command line, print its summary and write its report."""
    console = Console()
    checked = check(parse(f"{__doc__}\nEvaluations: {', '.join(EVALUATIONS)}."))
    if checked.config.plan:
        console.print(plan(checked))
        return
    done = run(checked, console)
    epilogue(console, *done)
    console.print(f"report:  {render(done[0].storage.url)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
