"""The report of a run: one self-contained HTML file with figures, key numbers and an explorer of all texts.

Model text is untrusted: it is embedded as data (compressed, base64) and inserted into the page as text nodes only.
"""

import base64
import gzip
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from melbo_ray.errors import UserError, first_line
from melbo_ray.report import comparison, plots, why
from melbo_ray.report.sections import SECTIONS, figures
from melbo_ray.runs import checks, queries
from melbo_ray.runs.manifest import Manifest, Outcome
from melbo_ray.runs.queries import select, under_threshold, unsteered
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SINK
from melbo_ray.runs.storage import Storage

_ROOM = 24_000_000
"""Maximum bytes of compressed texts in the page, which with Plotly and the figures stays below 30 MB."""


def render(run_url: str) -> str:
    """Write `report.html` into the run at `run_url`, a directory or fsspec URL; returns its location.

    The file has all figures of every concept, a comparison of the concepts, and an explorer of all texts.

    Raises:
        UserError: no run there, unreadable or unwritable storage, a corrupt part, or another schema version.
    """
    storage = Storage(run_url, patient=False)
    manifest = Run(storage).manifest()
    if manifest is None:
        raise UserError(f"no run at {storage.url}: expected run.json there")
    db = queries.connect(run_url)
    with queries.reading(storage.url):
        page = _page(db, manifest, storage.url)
    storage.put("report.html", page.encode("utf-8", "replace"))
    return f"{storage.url}/report.html"


def export(run_url: str, folder: str) -> list[str]:
    """Write every figure of the run as PNG and SVG on white, `<folder>/<concept>-<figure>.png`; returns the paths.

    Raises:
        UserError: kaleido or Chrome is missing, or an error as in `render`.
    """
    db = queries.connect(run_url)
    with queries.reading(run_url):
        drawn = {f"{c}-{name}": fig for c in _concepts(db) for name, fig in figures(db, c).items()}
        drawn = {**drawn, "comparison": plots.draw_comparison(db, _concepts(db))}
    found = [(name, fig.update_layout(paper_bgcolor="white")) for name, fig in drawn.items() if fig is not None]
    paths: list[str | Path] = [f"{folder}/{name}.{suffix}" for name, _ in found for suffix in ("png", "svg")]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        pio.write_images([fig for _, fig in found for _ in range(2)], paths, width=900, scale=2)
    except OSError as error:
        raise UserError(f"cannot write figures into {folder}: {error}") from None
    except (ImportError, ValueError, RuntimeError) as error:
        remedy = "pip install kaleido; apt-get install chromium; export BROWSER_PATH=/usr/bin/chromium"
        raise UserError(f"figures as files need kaleido and a Chrome ({remedy}): {first_line(error)}") from None
    return [str(path) for path in paths]


def _page(db: duckdb.DuckDBPyConnection, manifest: Manifest, url: str) -> str:
    concepts = _concepts(db)
    environment = Environment(
        loader=PackageLoader("melbo_ray.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    assets = files("melbo_ray") / "report/templates"
    scripts = [
        get_plotlyjs(),
        *((assets / f"{name}.js").read_text("utf-8") for name in ("report", "explorer", "start")),
    ]
    together = plots.draw_comparison(db, concepts)
    return environment.get_template("report.html").render(
        url=url,
        facts=_facts(manifest),
        concepts=concepts,
        sections=SECTIONS,
        summaries={c: summary(db, c, manifest.concepts.get(c, Outcome())) for c in concepts},
        whys={concept: why.told(db, concept) for concept in concepts},
        comparisons={concept: comparison.cells(db, concept) for concept in concepts},
        figures={
            "concepts": {c: {name: _json(fig) for name, fig in figures(db, c).items()} for c in concepts},
            "comparison": together and _json(together),
        },
        checks=checks.worst(manifest.checks),
        prompts=manifest.prompts,
        texts={c: _texts(db, c, manifest.prompts.get(c, {}), _ROOM // len(concepts)) for c in concepts},
        style=Markup((assets / "report.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def _concepts(db: duckdb.DuckDBPyConnection) -> list[str]:
    return [row[0] for row in db.execute("SELECT DISTINCT concept FROM vectors ORDER BY concept").fetchall()]


def _json(fig: go.Figure) -> dict[str, Any]:
    return json.loads(fig.to_json())


def _facts(manifest: Manifest) -> dict[str, str]:
    """The facts about the run at the head of the page."""
    config = manifest.config
    facts = {
        "run": manifest.run_id,
        "status": manifest.status,
        "begun": manifest.created,
        "model": config.get("model"),
        "revision": config.get("revision"),
        "weights": manifest.fingerprint,
        "source → target layer": f"{config.get('source_layer')} → {config.get('target_layer')}",
        "R": "calibrated for each concept" if config.get("radius") == "auto" else config.get("radius"),
        "z from position": config.get("z_from"),
        "base": config.get("base"),
        "solver": config.get("solver"),
        "system prompt": config.get("system_prompt"),
        "seed": config.get("seed"),
        "measured of an even sample": (n := config.get("sample")) and f"all but KL, greedy texts: {n} vectors a chain",
        "hardware": ", ".join(map(str, manifest.hardware.values())),
        "self-check": checks.line(manifest.checks),
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


_SUMMARY = """
    WITH k AS (SELECT kind, kl_from_base AS nats FROM kl
               WHERE concept = $1 AND scale = 'own' AND isfinite(kl_from_base)),
         c AS (FROM k WHERE kind = 'chain'),
         r AS (FROM k WHERE kind = 'random'),
         x AS (FROM k WHERE kind = 'shuffled'),
         v AS (FROM vectors WHERE concept = $1 AND kind = 'chain'),
         t AS (FROM generations WHERE concept = $1 AND scale = 'own'),
         w AS (FROM t WHERE temperature = 0 AND prompt_id = 'training'),
         g AS (FROM generalization WHERE concept = $1 AND kind = 'chain' AND prompt_id <> 'training'),
         s AS (FROM summary WHERE concept = $1)
    SELECT (SELECT count(*) FROM v) AS vectors,
           (SELECT median(nats) FROM c) AS chain, (SELECT median(nats) FROM r) AS random,
           (SELECT median(nats) FROM x) AS shuffled,
           (SELECT min(norm) FROM v) AS low,
           (SELECT max(norm) FILTER (isfinite(norm)) FROM v) AS high,
           (SELECT max(max_abs_cos) FILTER (isfinite(max_abs_cos)) FROM v) AS cos,
           (SELECT avg((log_likelihood_ratio > 0)::INT) FROM g) AS general,
           (SELECT avg(detected::INT) FROM w WHERE kind = 'chain') AS greedy,
           (SELECT avg(detected::INT) FROM w WHERE kind = 'unsteered') AS greedy_unsteered,
           (SELECT avg(detected::INT) FROM t WHERE kind = 'chain' AND temperature > 0) AS sampled,
           (SELECT max(value) FROM s WHERE figure = 'radius' AND kind = 'base') AS radius,
           (SELECT max(value) FROM s WHERE figure = 'sink_share' AND kind = 'base') AS sink,
           (SELECT max(value) FROM s WHERE figure = 'change_point') AS change,
           (SELECT max(value) FROM s WHERE figure = 'bessel_rms_component') AS bessel,
           (SELECT max(value) FROM s WHERE figure = 'contrast_norm_for_half_score') AS half
"""


_WARNING = ": an attention sink, read relative_loss_from_1"


def summary(db: duckdb.DuckDBPyConnection, concept: str, outcome: Outcome) -> dict[str, str]:
    """The key numbers of a concept by their names; – where something was not measured."""
    n = {name: float(values[0]) for name, values in select(db, _SUMMARY, concept).items()}
    counts = under_threshold(db, concept)
    below = {share: counts.get(f"below_{share}_percent", math.nan) / counts.get("vectors", 1) for share in (10, 50)}
    audit = outcome.max_abs_cos
    return {
        "R, norm of the base": _number(n["radius"]),
        "the target's part at the first position": _share(n["sink"]) + (_WARNING if n["sink"] >= SINK else ""),
        "vectors": f"{n['vectors']:.0f}",
        "the chain ended": outcome.stop_reason or "–",
        "KL from base, median": _number(n["chain"], " nats"),
        "KL, unsteered": _number(unsteered(db, concept), " nats"),
        "KL, random directions": _number(n["random"], " nats"),
        "KL, shuffled target": _number(n["shuffled"], " nats"),
        "vectors below 10 % of unsteered KL": _share(below[10]),
        "vectors below 50 % of unsteered KL": _share(below[50]),
        "KL changes most at n": _number(n["change"]),
        "norms": f"{_number(n['low'])} – {_number(n['high'])}",
        "largest |cos| of any two": _number(n["cos"] if audit is None else audit),
        "base's held-out answers made likelier": _share(n["general"]),
        "greedy texts detected, training prompt": _share(n["greedy"]),
        "the same, unsteered": _share(n["greedy_unsteered"]),
        "sampled texts detected, all prompts": _share(n["sampled"]),
        "Bessel: rms part on any direction ≤": _number(n["bessel"]),
        "mean difference: dose for half the effect": _number(n["half"]),
        "failed evaluations": "–" if outcome.failures is None else str(outcome.failures),
    }


def _number(value: float, unit: str = "") -> str:
    return f"{value:.3g}{unit}" if math.isfinite(value) else "–"


def _share(value: float) -> str:
    return f"{value:.0%}".replace("%", " %") if math.isfinite(value) else "–"


def _texts(db: duckdb.DuckDBPyConnection, concept: str, prompts: dict[str, str], room: int) -> str:
    """The explorer's data of a concept, compressed to at most `room` bytes."""
    limit = 2 * room
    while len(packed := _pack(_explorer(db, concept, prompts, limit))) > room and limit:
        limit = int(0.95 * limit * room / len(packed))
    return packed


def _explorer(db: duckdb.DuckDBPyConnection, concept: str, prompts: dict[str, str], limit: int) -> dict[str, Any]:
    """All numbers and texts of a concept, by column; of texts beyond `limit` bytes the highest samples are left out."""
    vectors = select(
        db,
        """SELECT kind, index AS n, coalesce(v.norm, k.norm) AS norm, loss, relative_loss, kl_from_base, kl_to_base,
                  kl_from_unsteered, evaluations, stop_reason, max_abs_cos, cos_contrast, nearest_token, top_tokens,
                  top_probs
           FROM (FROM vectors WHERE concept = $1 AND kind <> 'avoided') v
           FULL JOIN (FROM kl WHERE concept = $1 AND scale = 'own') k USING (kind, index)
           LEFT JOIN (FROM geometry WHERE concept = $1) g USING (kind, index) ORDER BY kind, n""",
        concept,
    )
    texts = select(
        db,
        f"""SELECT kind, index AS n, prompt_id, scale, sample, temperature, text, concept_score, detected FROM (
                SELECT *, sum(strlen(text)) OVER (ORDER BY sample, index, kind, prompt_id, scale) AS bytes
                FROM generations WHERE concept = ?) WHERE bytes < {limit}
            ORDER BY kind, n, prompt_id, scale, sample""",
        concept,
    )
    total = db.execute("SELECT count(*) FROM generations WHERE concept = ?", [concept]).fetchall()[0][0]
    columns = {
        name: {k: _plain(column) for k, column in part.items()}
        for name, part in (("vectors", vectors), ("texts", texts))
    }
    return columns | {"prompts": prompts, "left_out": total - len(texts["n"])}


def _plain(column: np.ndarray) -> list[Any]:
    """A column as JSON values, with six significant digits and null for NaN and infinities."""
    if column.dtype.kind == "f":
        return [float(f"{x:.6g}") if math.isfinite(x) else None for x in column.tolist()]
    return [_plain(np.asarray(x)) if isinstance(x, (np.ndarray, list)) else x for x in column.tolist()]


def _pack(value: Any) -> str:
    raw = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(raw.encode("utf-8", "replace"), 6, mtime=0)).decode()
