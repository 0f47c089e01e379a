"""Find base vectors only: MELBO's candidates for each concept, with the model's text under each.

melbo-ray bases --concepts code,alien
melbo-ray run --concepts code --base-index 3       # a chain from candidate 3
"""

from rich.console import Console

from melbo_ray.cli import parse
from melbo_ray.study.preflight import check
from melbo_ray.study.runner import run
from melbo_ray.study.summary import candidates


def main(args: list[str]) -> None:
    """Run MELBO, and print the candidates."""
    console = Console()
    checked = check(parse(__doc__ or "", args, "melbo-ray bases").model_copy(update={"evals": []}))
    stored, manifest = run(checked, console, chains=False)
    for concept in manifest.concepts:
        console.print(candidates(stored, concept))
    console.print(f"results: {stored.storage.url}", highlight=False, soft_wrap=True)
