"""The benchmark of memory: the formula's estimate for each kind of worker against its resident peak (see bench.py).

Every worker is a fresh process that performs each task of its kind once.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from benchmarks.reference import Bench, Row
from melbo_ray.cluster.memory import demands
from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.evals.catalog import PER_VECTOR
from melbo_ray.host import resident_peak
from melbo_ray.model.loading import EMBEDDED, load_config, locate
from melbo_ray.model.partial import reads_whole, sketch
from melbo_ray.runs import schema
from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import Certificate
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.vectors import BaseVector, SteeringVector, row

SECOND = "MELBO_SECOND_MODEL"
# Qwen2.5-1.5B's, and one for a quick look; saved as bfloat16, as models are published.
SHAPES = {
    "1.5B, random weights": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "tiny, random weights": Qwen2Config(
        vocab_size=50000, hidden_size=64, intermediate_size=128, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
# What changes no size but how long it takes: the steps of a search, vectors, tokens below a batch's width.
_SHORT: dict[str, Any] = {
    "num_vectors": 2,
    "max_evaluations": 3,
    "melbo_steps": 1,
    "max_new_tokens": 8,
    "max_relative_loss": 1e9,
}


def memory(bench: Bench) -> Iterator[Row]:
    """Each worker of each model at the options' defaults: GiB at most, and what it was asked for.

    The embedded model, the one that MELBO_SECOND_MODEL names, and a shape of 1.5 billion parameters; quick: a tiny one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in _models(Path(scratch), bench.quick):
            config = Config(model=model, device="cpu", **_SHORT)
            concept = load_concept(config.concepts[0])
            asked = demands(sketch(config), config, [concept], load_config(model).dtype, reads_whole(config))
            for role, demand in vars(asked).items():
                packed = demand.on_cpu(packed=True) < os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
                peak, wanted = _measured(role, config, packed), demand.on_cpu(packed)
                note = f"{wanted / 2**30:.2f} GiB asked, {wanted / peak:.2f} times as much; "
                note += "packed" if packed else "not packed, for which memory is short now"
                yield Row("memory", f"{name}: {role}", peak / 2**30, "GiB", note=note)


def _models(scratch: Path, quick: bool) -> Iterator[tuple[str, str]]:
    """(name, model) of each; those of random weights lie in `scratch` while they are in turn."""
    second = os.environ.get(SECOND)
    if not quick:
        yield EMBEDDED, EMBEDDED
        if second:
            yield Path(second).name, second
    name = list(SHAPES)[quick]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16).save_pretrained(scratch)
    path, options = locate(EMBEDDED if quick or not second else second)
    tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
    tokenizer.save_pretrained(scratch)
    yield name, str(scratch)


def _measured(role: str, config: Config, packed: bool) -> int:
    """The resident peak of a worker in a process of its own, bytes.

    Raises:
        RuntimeError: it failed; with the last thing that it said.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.memory",
        role,
        "packed" if packed else "plain",
        config.model_dump_json(exclude={"config"}),
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the {role} failed: {said[-1]}")
    return int(done.stdout.split()[-1])


def work(role: str, packed: bool, folder: str, config: Config) -> int:
    """All that a worker of this role does, once, with its run in `folder`; its resident peak, bytes."""
    concept, run = load_concept(config.concepts[0]), Run.open(folder)
    run.write_manifest(Manifest(run_id="bench"))
    worker = Worker(folder, "bench", config, [concept], 1, role == "evaluator", packed)
    worker.ready()
    base = normalize(torch.ones(worker.model.d_model), dim=0)
    if role == "chain":
        written = {"vectors": schema.table("vectors", [row("bench", "base", BaseVector(base))])}
        run.commit(Unit.base(concept.name), written)
        list(worker.chains([concept.name]))
    else:
        while worker.find_base(concept.name) is not None:
            pass
        for name in PER_VECTOR:
            worker.evaluate(Unit(concept.name, name, "chain", 1, 1), -base[None].numpy(), base.numpy(), {})
        figures: dict[str, Any] = dict.fromkeys(Certificate.__annotations__, 0) | {"stop_reason": ""}
        first = SteeringVector(**figures, index=1, theta=-base)
        run.commit(Unit.vector(concept.name, 1), {"vectors": schema.table("vectors", [row("bench", "chain", first)])})
        worker.evaluate(Unit(concept.name, "shuffled", "shuffled", 1, 1), None, base.numpy(), {})
    return resident_peak()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        peak = work(sys.argv[1], sys.argv[2] == "packed", scratch, Config.model_validate_json(sys.argv[3]))
    print(peak)
