"""Results of a run on a terminal: summary, candidates for the base, and location of the data."""

import math
import statistics

import duckdb
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from melbo_ray.report.intervals import median_interval
from melbo_ray.runs import checks, queries
from melbo_ray.runs.manifest import Manifest, Outcome
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SINK


def summary(run: Run, manifest: Manifest) -> Table:
    """The summary of a run's published results, a column per concept.

    KL is KL(P_n ‖ P_base) at the vector's own norm, counted below 10 % and 50 % of that of the unsteered model.
    """
    db = queries.connect(run.storage.url)
    table = Table("", *manifest.concepts, title=f"Run {manifest.run_id}", title_justify="left")
    columns = [_facts(run, db, concept, outcome) for concept, outcome in manifest.concepts.items()]
    for name in columns[0] if columns else ():
        table.add_row(name, *(column[name] for column in columns))
    return table


def _facts(run: Run, db: duckdb.DuckDBPyConnection, concept: str, outcome: Outcome) -> dict[str, str]:
    vectors = run.read("vectors", concept)
    chain = vectors.filter(pc.field("kind") == "chain")
    norms, seconds = chain["norm"].to_pylist(), chain["seconds"].to_pylist()
    counts = queries.under_threshold(db, concept)
    medians = {kind: _median_kl(run, concept, kind) for kind in ("chain", "random", "shuffled")}
    return {
        "the base": base_reason(run, concept) or "–",
        "R, and the first position's share of the target": _of_base(run, concept),
        "vectors found": str(len(chain)),
        "why the chain stopped": str(outcome.stop_reason),
        "KL from the base, nats: median [95 %]": medians["chain"],
        "the same, random directions": medians["random"],
        "the same, shuffled targets": medians["shuffled"],
        "KL below 10 % of unsteered": str(counts.get("below_10_percent", "–")),
        "KL below 50 % of unsteered": str(counts.get("below_50_percent", "–")),
        "KL unsteered, nats": f"{queries.unsteered(db, concept):.3f}" if counts else "–",
        "greedy texts with the concept": _greedy_texts(run, concept),
        "norms": f"{min(norms):.2f} to {max(norms):.2f}" if norms else "–",
        "largest |cos|": "–" if outcome.max_abs_cos is None else f"{outcome.max_abs_cos:.1e}",
        "seconds per vector, median": f"{statistics.median(seconds):.2f}" if seconds else "–",
        "failed evaluations": str(outcome.failures),
    }


def base_reason(run: Run, concept: str) -> str:
    """One line on the candidate that is the base, and why it was taken; empty if there are no candidates."""
    taken = [row for row in run.read("candidates", concept).to_pylist() if row["taken"]]
    return f"candidate {taken[0]['index']}: {taken[0]['reason']}" if taken else ""


def base_figures(run: Run, concept: str) -> dict[str, float]:
    """The base's statistics in the table `summary`: `radius`, `sink_share`, `coordinate_share`."""
    return {row["figure"]: row["value"] for row in run.read("summary", concept).to_pylist() if row["kind"] == "base"}


def _of_base(run: Run, concept: str) -> str:
    figures = base_figures(run, concept)
    if not figures:
        return "–"
    warning = "" if figures["sink_share"] < SINK else ": READ relative_loss_from_1"
    return f"{figures['radius']:.3g}, {figures['sink_share']:.0%}{warning}"


def candidates(run: Run, concept: str) -> Table:
    """The candidates for the base, best first, with their scores, texts and reasons.

    `coherence` is in nats per token under the unsteered model; `held out` counts the held-out prompts on which only the
    steered model shows the concept.
    """
    columns = ("", "objective", "concept score", "coherence", "held out", "greedy text", "why")
    table = Table(*columns, title=f"{concept} (→ the base)", title_justify="left")
    for row in sorted(run.read("candidates", concept).to_pylist(), key=lambda row: row["rank"]):
        numbers = (f"{row['objective']:.4g}", f"{row['concept_score']:.3f}", f"{row['coherence']:.2f}")
        gained = "–" if row["held_out_texts"] is None else f"{row['held_out_gained']} of {len(row['held_out_texts'])}"
        index = f"{'→ ' if row['taken'] else ''}{row['index']}"
        # A model's text is untrusted: neither rich markup nor terminal escapes may take effect.
        table.add_row(index, *numbers, gained, Text(printable(row["text"])), row["reason"])
    return table


def printable(text: str) -> str:
    """The text with every non-printable character except line breaks replaced by �."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "�" for mark in text)


def _median_kl(run: Run, concept: str, kind: str) -> str:
    """The median KL from the base at the vectors' own norms, with its 95 % interval over vectors."""
    rows = run.read("kl", concept).filter((pc.field("kind") == kind) & (pc.field("scale") == "own"))
    values = [value for value in rows["kl_from_base"].to_pylist() if math.isfinite(value)]
    if not values:
        return "–"
    median, (low, high) = statistics.median(values), median_interval(values)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]" if len(values) > 1 else f"{median:.2f}"


def _greedy_texts(run: Run, concept: str) -> str:
    """The number of greedy texts on the training prompt in which the concept was detected, at the own norms."""
    wanted = {"kind": "chain", "prompt_id": "training", "scale": "own", "temperature": 0}
    rows = run.read("generations", concept).to_pylist()
    found = [row["detected"] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return f"{sum(found)} of {len(found)}" if found else "–"


def epilogue(console: Console, run: Run, manifest: Manifest) -> None:
    """Print the summary, peak memory, self-check, location of the results, and a query to paste."""
    console.print(summary(run, manifest))
    if peaks := manifest.peak_memory:
        told = ", ".join(f"{role} {peak / 1e9:.1f} GB" for role, peak in sorted(peaks.items()))
        console.print(f"memory at most: {told}", highlight=False)
    if told := checks.line(manifest.checks):
        console.print(f"self-check: {told}", highlight=False, soft_wrap=True)
    url = run.storage.url
    console.print(f"results: {url}", highlight=False, soft_wrap=True)
    sql = "SELECT concept, index, kl_from_base FROM kl WHERE kind = 'chain' AND scale = 'own' ORDER BY ALL"
    command = f'python -c "from melbo_ray.runs.queries import connect; connect(\'{url}\').sql(\\"{sql}\\").show()"'
    console.print(f"query:   {command}", highlight=False, soft_wrap=True)
