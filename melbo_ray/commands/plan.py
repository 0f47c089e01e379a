"""Estimate what a study will take: memory, GPUs, time and storage. Its options are those of `melbo-ray run`.

melbo-ray plan --model Qwen/Qwen1.5-1.8B-Chat --num-vectors 1558
"""

from rich.console import Console

from melbo_ray.cli import parse
from melbo_ray.study.planner import plan
from melbo_ray.study.preflight import check


def main(args: list[str]) -> None:
    """Print the plan; nothing is written or started."""
    Console().print(plan(check(parse(__doc__ or "", args, "melbo-ray plan"))))
