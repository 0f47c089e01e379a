"""Serve a local page on this machine alone: pick a concept and n, slide the norm, type a prompt, read what comes.

melbo-ray play --run runs/RUN                 # prints the address to open; Ctrl-C ends it
"""

from melbo_ray.cli import Parser
from melbo_ray.play.server import PlayServer
from melbo_ray.play.stage import Stage


def main(args: list[str]) -> None:
    """Load the run's model, and serve until Ctrl-C."""
    parser = Parser("play", __doc__)
    parser.add_argument("--run", required=True, help="folder of the run: a directory or fsspec URL")
    parser.add_argument("--port", type=int, default=8777, help="port on 127.0.0.1; 0 for any free one (default 8777)")
    parser.add_argument("--model", help="where the run's model lies, if not where the run found it")
    parser.add_argument("--device", default="auto", help="device: auto, cpu, or cuda")
    options = parser.parse_args(args)
    with PlayServer(Stage.open(options.run, options.model, options.device), options.port) as server:
        print(f"open {server.url}   (Ctrl-C ends it)", flush=True)
        server.serve_forever()
