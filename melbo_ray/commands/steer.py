"""Print the greedy texts of a prompt under a vector of a run, under its base, and without steering, side by side.

melbo-ray steer --run runs/RUN --index 129 "How can I bake bread?"
melbo-ray steer --run runs/RUN --concept alien --index 3 --norm 8      # the training prompt, at another norm
"""

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from melbo_ray.cli import Parser
from melbo_ray.play.stage import Stage
from melbo_ray.study.summary import printable


def main(args: list[str]) -> None:
    """Load the run's model, and print a table."""
    parser = Parser("steer", __doc__)
    parser.add_argument("prompt", nargs="?", help="what the user says; by default the concept's training prompt")
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument("--index", type=int, default=1, help="index of the vector in its chain (default 1)")
    parser.add_argument("--concept", help="concept of the chain, where the run has several")
    parser.add_argument("--norm", type=float, help="norm of the vector (default: its own)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="maximum length of a text, tokens (default 48)")
    parser.add_argument("--model", help="where the run's model lies, if not where the run found it")
    parser.add_argument("--device", default="auto", help="device: auto, cpu, or cuda")
    options = parser.parse_args(args)
    if options.max_new_tokens < 1:
        parser.error("--max-new-tokens: expected at least 1")
    stage = Stage.open(options.run, options.model, options.device)
    concept = options.concept or next(iter(stage.vectors))
    if options.concept is None and len(stage.vectors) > 1:
        parser.error(f"the run has several concepts: give --concept, one of {', '.join(stage.vectors)}")
    directions = stage.directions(concept, options.index, options.norm)
    del directions["random"]
    titles = {
        "vector": f"{concept} {options.index}, norm {float(directions['vector'].norm()):.3g}",
        "base": f"base, norm {float(directions['base'].norm()):.3g}",
        "unsteered": "unsteered",
    }
    texts: dict[str, str] = {}
    for event in stage.write(options.prompt or stage.prompt(concept), directions, options.max_new_tokens):
        texts[event.name] = getattr(event, "text", "")
    table = Table(*(Column(Text(titles[name])) for name in ("base", "vector", "unsteered")))
    # A model's text is untrusted: neither rich markup nor terminal escapes may take effect.
    table.add_row(*(Text(printable(texts[name])) for name in ("base", "vector", "unsteered")))
    Console().print(table)
