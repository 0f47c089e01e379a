"""The table of architectures: every family of decoders in transformers, tiny, checked against plain transformers.

Usage: python -m benchmarks.architectures [--families llama,mamba] [--out docs/architectures.md]

Ends with 1 where a cell is wrong. Each family is checked in a process of its own: one that crashes or hangs is a row.
"""

import argparse
import collections
import importlib.metadata
import multiprocessing
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from melbo_ray.errors import first_line  # noqa: E402 - the folder above must be known first
from tests.architectures import CHECKS, LAYERS, families, judge  # noqa: E402

# Torch is imported once for all.
_FORK = multiprocessing.get_context("fork")
VERDICTS = ("exact", "plain way", "refused", "wrong")
# Seconds of one family, which take two.
_LIMIT = 300
_HEAD = """# Architectures

Every family of text-only decoders in transformers {transformers} (torch {torch}, float32 on the CPU), made tiny with
random weights and compared with plain transformers and a hook. `python -m benchmarks.architectures` writes this page.

- slice: the target layer's stream, the loss and its gradient, on prompts of two lengths.
- logits: the next token's under a vector a row, and under one vector for prompts that begin alike.
- scores: of several continuations of a prompt, against one continuation a row.
- texts: greedy, token for token those of `generate` with a hook.
- fingerprint: stable across loads, another for another weight; the lower layers alone are the whole model's.

*exact*: equal but for the last bits. *plain way*: the faster way does not suit the model, which a warning says, and the
slower one that is taken is exact. *refused*: ends in one line. Of {named} the decoder layers
are named with `--layers`. {counts}
"""


def main() -> int:
    """Check, write the page, and tell how many cells there are of each verdict."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", help="only these, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    options = parser.parse_args()
    names = options.families.split(",") if options.families else families()
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {}
    for name in names:
        rows[name] = _judged(name)
        print(name, *(rows[name].get(check, {}).get("verdict", "not built") for check in CHECKS), flush=True)
    options.out.write_text(page(rows), encoding="utf-8")
    return int(any(cell["verdict"] == "wrong" for row in rows.values() for cell in row.values()))


def page(rows: dict[str, dict]) -> str:
    """The page, in markdown; a row is a family's cells by check, or has `built`: why there is no such model."""
    judged = {name: row for name, row in rows.items() if "built" not in row}
    cells = [cell["verdict"] for row in judged.values() for cell in row.values()]
    counts = f"{len(judged)} families: " + ", ".join(f"{cells.count(verdict)} {verdict}" for verdict in VERDICTS) + "."
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
    table = [f"| family | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    table += [f"| {name} | {' | '.join(row[check]['verdict'] for check in CHECKS)} |" for name, row in judged.items()]
    why = collections.defaultdict(set)
    for name, row in judged.items():
        for cell in row.values():
            for reason in cell["why"]:
                # A tensor's sizes are of these prompts.
                why[cell["verdict"], re.sub(r"\d+(×\d+)+", "a table", reason)].add(name)
    reasons = [f"- {verdict}: {reason} ({', '.join(sorted(of))})" for (verdict, reason), of in sorted(why.items())]
    missing = [f"- {name}: {row['built']['why']}" for name, row in rows.items() if "built" in row]
    blocks = [_HEAD.format(counts=counts, named=" and ".join(LAYERS), **versions), "\n".join(table)]
    blocks += ["## Why\n\n" + "\n".join(reasons)] if reasons else []
    blocks += ["## Not built\n\n" + "\n".join(missing)] if missing else []
    return "\n\n".join(block.rstrip() for block in blocks) + "\n"


def _judged(family: str) -> dict[str, dict[str, str]]:
    """Its row, from a process of its own."""
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_send, args=(theirs, family))
    process.start()
    theirs.close()
    try:
        if ours.poll(_LIMIT):
            return ours.recv()
        why = "it does not end"
    except EOFError:
        process.join()
        why = f"the process ends with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {check: {"verdict": "wrong", "why": [why]} for check in CHECKS}


def _send(pipe: Any, family: str) -> None:
    try:
        row = judge(family)
    # What a family says that cannot be built of its configuration, or not read, is its own.
    except Exception as error:
        row = {"built": {"verdict": "", "why": f"{type(error).__name__}: {first_line(error)}"}}
    pipe.send(row)


if __name__ == "__main__":
    sys.exit(main())
