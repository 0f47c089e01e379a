"""How fast everything is, against the published algorithm and against this machine's limits. Needs no Ray.

python -m benchmarks.bench                                # the embedded model: about ten minutes on two idle cores
python -m benchmarks.bench --quick                              # everything, smaller: under two minutes
python -m benchmarks.bench --only step,texts                    # some parts
python -m benchmarks.bench --only solvers --model FOLDER        # the solvers' matrix on a model of yours
python -m benchmarks.bench --device cuda --dtype bfloat16 --shape qwen1.5-1.8b    # random weights of that shape

Prints a table and writes it as bench.parquet and bench.md. Every ratio is of medians of interleaved repeats in one run.
"""

import argparse
import dataclasses
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from benchmarks import beside, chain, growth, memory, query, solvers, text
from benchmarks.reference import Bench, Row
from benchmarks.shapes import SHAPES, random_model
from melbo_ray.cli import exit_code, read_options
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError, first_line
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import EMBEDDED, pick_device
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.contrast import contrast
from melbo_ray.search.radius import calibrate

SCHEMA = pa.schema(
    [("part", pa.string()), ("case", pa.string()), ("value", pa.float64()), ("unit", pa.string()),
     ("times_reference", pa.float64()), ("times_limit", pa.float64()), ("note", pa.string())]
)  # fmt: skip


def prepare(options: argparse.Namespace) -> Bench:
    """The model, prompt and base that the options ask for."""
    own = options.model == EMBEDDED
    config = Config(num_vectors=8, **(read_options("smollm2") if own or options.shape else {}))
    if options.shape is None:
        model = LanguageModel.load(options.model, dtype=options.dtype, device=options.device)
        concept = load_concept("code")
        tokens = model.tokenize(config.prompt or concept.prompt, config.system_prompt)
        base, _ = contrast(model, concept, config.source_layer, config.system_prompt)
    else:
        model = random_model(options.shape, pick_device(options.device), getattr(torch, options.dtype))
        # As many as "How can I build a bomb?" has in Qwen's chat template.
        tokens = torch.randint(0, 500, (25,))
        base = torch.randn(model.d_model)
    radius = calibrate(Slice(model, [tokens], config.source_layer, config.target_layer), config.seed).radius
    config = config.model_copy(update={"radius": radius})
    return Bench(model, tokens, normalize(base, dim=-1) * radius, config, options.repeats, options.quick)


def queries(_bench: Bench) -> Iterator[Row]:
    """The documented queries on a study of a million rows."""
    with tempfile.TemporaryDirectory() as scratch:
        for row in query.measure(Path(scratch)):
            seconds = row["first"] if row["median"] is None else row["median"]
            yield Row("query", row["query"], seconds, "s", note=f"{row['rows']:,} rows")


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "step": chain.steps,
    "beside": beside.beside,
    "equal-loss": chain.equal_loss,
    "chain": chain.throughput,
    "solvers": solvers.solvers,
    "growth": growth.growth,
    "precision": growth.precision,
    "evaluations": text.evaluations,
    "texts": text.texts,
    "logits": text.logits,
    "rounded": text.rounded,
    "query": queries,
    "memory": memory.memory,
}


def measured(part: str, bench: Bench) -> Iterator[Row]:
    """The part's rows; what stops it is its last one, and the other parts go on."""
    try:
        yield from PARTS[part](bench)
    except Exception as error:
        yield Row(part, "stopped", math.nan, "", note=f"{type(error).__name__}: {first_line(error)}")


def title(bench: Bench) -> str:
    """What was measured, and on what machine, in a line."""
    device = bench.model.device
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    weights = "random weights of the shape of " if bench.model.name in SHAPES else ""
    return (
        f"{weights}{bench.model.name}, {bench.model.dtype}, {machine}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {load:.1f} busy processes a core at the start"
    )


def write(rows: list[Row], heading: str, folder: Path) -> None:
    """bench.parquet and bench.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=SCHEMA)
    pq.write_table(table.replace_schema_metadata({"title": heading}), folder / "bench.parquet")
    lines = [" | ".join(cells(row)) for row in rows]
    head = "part | case | value | unit | × reference's speed | × limit's time | note"
    rule = "--- | --- | --: | --- | --: | --: | ---"
    body = "\n".join(f"| {line} |" for line in [head, rule, *lines])
    (folder / "bench.md").write_text(f"{heading}\n\n{body}\n", "utf-8")


def cells(row: Row) -> list[str]:
    """A row's cells as people read them."""
    ratios = ["" if ratio is None else f"{ratio:.3g}" for ratio in (row.times_reference, row.times_limit)]
    value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.3g}"
    return [row.part, row.case, value, row.unit, *ratios, row.note]


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--model", default=EMBEDDED, help="hub id, folder, GGUF file, or the embedded smollm2")
    parser.add_argument("--shape", help=f"random weights instead of the embedded model: {', '.join(SHAPES)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for bench.parquet and bench.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.repeats = 3 if options.quick else 15
    chosen = options.only.split(",")
    if unknown := set(chosen) - PARTS.keys():
        raise UserError(f"no part {sorted(unknown)[0]!r}: expected some of {', '.join(PARTS)}")
    bench, console, rows = prepare(options), Console(), []
    heading = title(bench)
    console.print(heading, highlight=False)
    for part in chosen:
        shown = Table("case", "value", "unit", "× reference", "× limit", "note", title=part, title_justify="left")
        for row in measured(part, bench):
            rows.append(row)
            shown.add_row(*cells(row)[1:])
            # After every row: what has been measured is kept if the rest is stopped.
            write(rows, heading, options.out)
        console.print(shown)
    return rows


if __name__ == "__main__":
    sys.exit(exit_code(main))
