"""Replay an exported file on a model, and say by how much its vectors do something else than its sidecar says.

melbo-ray verify vectors/code-129.gguf
melbo-ray verify vectors/code-129.gguf --model models/mine --other-model     # another dtype, or a fine-tuned model
"""

from melbo_ray.cli import Parser
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.study.replay import sidecar_of, verify


def main(args: list[str]) -> None:
    """Print a line for each vector of the file."""
    parser = Parser("verify", __doc__)
    parser.add_argument("file", help="a file that export wrote, with its sidecar beside it")
    parser.add_argument("--model", help="model: hub id, directory, or GGUF file; by default the sidecar's")
    parser.add_argument("--other-model", action="store_true", help="allow a model of another fingerprint")
    parser.add_argument("--device", default="auto", help="device: auto, cpu, or cuda")
    options = parser.parse_args(args)
    told = sidecar_of(options.file).model
    revision = told.revision if options.model in (None, told.name) else None
    model = LanguageModel.load(options.model or told.name, revision=revision, dtype=told.dtype, device=options.device)
    for row in verify(options.file, model, options.other_model):
        expected = "" if row.kl_difference is None else f" ({row.kl_difference:+.2e} from what was measured)"
        top = "nothing to compare with" if row.probability is None else f"top-10 within {row.probability:.2e}"
        print(
            f"vector {row.index}: KL from unsteered {row.kl:.4f} nats{expected}; {top}; norm {row.norm:+.1e} relative"
        )
