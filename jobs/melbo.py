"""Find base vectors only: MELBO's candidates for each concept, with the model's text under each.

python jobs/melbo.py --concepts code,alien
python jobs/ortho.py --concepts code --base-index 3       # a chain from candidate 3
"""

import sys

from rich.console import Console

from melbo_ray.cli import exit_code, parse
from melbo_ray.study.preflight import check
from melbo_ray.study.runner import run
from melbo_ray.study.summary import candidates


def main() -> None:
    """Run MELBO with the options of the command line, and print the candidates."""
    console = Console()
    checked = check(parse(__doc__ or "").model_copy(update={"evals": []}))
    stored, manifest = run(checked, console, chains=False)
    for concept in manifest.concepts:
        console.print(candidates(stored, concept))
    console.print(f"results: {stored.storage.url}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
