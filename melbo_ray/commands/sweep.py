"""Run a grid of studies as one job: every combination of models, concepts, layers, radii, seeds, or any other options.

melbo-ray sweep grid.toml              # the same command resumes; finished studies are skipped
melbo-ray sweep grid.toml --plan       # check every study, print which are left, and exit

    [options]                               # the same for every study; `storage` too
    model = "smollm2"
    num_vectors = 100
    [grid]                                  # a list for each option, or of options that go together
    concepts = ["code", "alien"]
    seed = [0, 1, 2]
    layers = [{source_layer = 8, target_layer = 16}, {source_layer = 6, target_layer = 12}]
"""

from rich.console import Console

from melbo_ray.cli import Parser
from melbo_ray.study.grid import check_all, overview, read_grid
from melbo_ray.study.sweep import outcome, run


def main(args: list[str]) -> None:
    """Check the grid, run what is left of it, and print and write its table and report."""
    parser = Parser("sweep", __doc__)
    parser.add_argument("grid", help="TOML file with [options] and [grid]")
    parser.add_argument("--plan", action="store_true", help="check every study, print them, and exit")
    options, console = parser.parse_args(args), Console()
    grid = read_grid(options.grid)
    studies = check_all(grid)
    if options.plan:
        console.print(overview(grid, studies))
        return
    run(grid, studies, console)
    outcome(grid, console)
