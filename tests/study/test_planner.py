"""The plan of a study, against figures counted by hand."""

import math
from typing import Any

import pytest
from transformers import LlamaConfig

from melbo_ray.config import Config
from melbo_ray.evals.catalog import EVALUATIONS
from melbo_ray.study.calibration import Machine
from melbo_ray.study.planner import counted, plan, runs_of_evaluations
from melbo_ray.study.preflight import check
from tests.families import byte_tokenizer

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
SECONDS = {"kl": 0.1, "greedy": 0.2, "generations": 4.0, "generalization": 2.0, "dose": 1.0, "presence": 0.01}
MACHINE = Machine("cpu", 1e15, 4e12, SECONDS, "two layers and ten")
LAYER = 8192 * (8192 + 2 * 1024 + 8192 + 3 * 28672) + 2 * 8192


@pytest.fixture
def told(tmp_path):
    """The plan of a model of 70B's shape, of which there are no weights: what it says, by name."""
    LlamaConfig(**LLAMA_70B).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = Config(
        model=str(tmp_path), dtype="bfloat16", source_layer=20, target_layer=40, num_vectors=1000, max_evaluations=50,
        eval_gpus=2, max_evaluators=4, prompt="Give me a list of five fruits.",
        evals=[*SECONDS, "control", "shuffled", "composition", "geometry", "rescaled"],
        storage=str(tmp_path / "runs"),
    )  # fmt: skip
    table = plan(check(config), MACHINE)
    names, values = (list(column.cells) for column in table.columns)
    assert not (tmp_path / "runs").exists()
    return dict(zip(names, values, strict=True))


def test_70b_is_counted_without_its_weights(told):
    whole = 80 * LAYER + 2 * 32000 * 8192 + 8192
    assert whole == 68_976_648_192
    assert told["parameters"].startswith("68.98 billion, 138.0 GB")
    read = 41 * LAYER + 2 * 32000 * 8192 + 8192
    assert told["the chain reads of them"].startswith(f"{read / 1e9:.2f} billion; a step runs {20 * LAYER / 1e9:.2f}")


def test_a_chain_needs_one_gpu_and_an_evaluator_spans_several(told):
    # Beside the weights: what the products of 20 layers put out for a prompt of 30 bytes, and 1,000 vectors.
    kept = 3 * 8192 + 2 * 1024 + 3 * 28672 + 4 * 8192
    read = 41 * LAYER + 2 * 32000 * 8192 + 8192
    needed = 2 * read + 2 * 30 * 20 * kept + 4 * 1000 * 8192
    assert told["memory of a chain actor"].endswith(f"{needed / 1e9:.1f} GB: 1 x 80 GB or 1 x 141 GB")
    assert told["memory of an evaluator"].endswith(
        "7 x 24 GB or 4 x 48 GB or 2 x 80 GB or 2 x 141 GB; spread over 2 (--eval-gpus)"
    )


def test_a_step_takes_what_reading_its_weights_twice_takes(told):
    seconds = 2 * 2 * 20 * LAYER / 4e12
    assert f"at least {1000 * seconds:.2g} ms" in told["a step of the chain"]
    # 50 a vector, and 64 for the preconditioner.
    assert told["the chain"].startswith("1000 vectors, 50064 steps at most:")


def test_the_evaluations_take_their_seconds_a_vector_on_as_many_evaluators(told):
    single = 1002 * sum(SECONDS.values())
    control = 1001 * (0.1 + 0.01) + 9 * (2 + 0.2 + 4 + 1)
    # 1,000 vectors have subsets of ten sizes, three each but of all of them one, at three scales.
    composed, shuffled = 3 * (9 * 3 + 1), 8 * (0.1 + 2 + 50 * 2 * 2 * 20 * LAYER / 4e12)
    total = single + control + 500 * 0.1 + composed * 0.2 + math.ceil(2 * composed / 17) * 1 + shuffled
    one, four = f"{total / 3600:.1f} h on one evaluator like this machine", f"{total / 4 / 60:.0f} min on 4"
    assert told["the evaluations"].startswith(f"{one}, {four}; from two layers and ten")
    assert told["the evaluations"].endswith("not counted: none")


def test_every_evaluation_is_counted_or_named_as_not_counted():
    not_counted = {"curvature", "frequency", "hessian", "independence", "jacobian", "linear"}
    assert {name for name in EVALUATIONS if not counted(name)} == not_counted
    assert all(runs_of_evaluations([name], 5) for name in set(EVALUATIONS) - not_counted - {"geometry"})


def test_of_a_sample_fewer_vectors_go_through_all_but_kl_and_greedy_texts():
    runs = runs_of_evaluations(["kl", "greedy", "dose", "presence"], 1000, sample=64)
    assert runs == {"kl": 1002, "greedy": 1002, "dose": 66, "presence": 66}
    assert runs_of_evaluations(["dose"], 10, sample=64) == {"dose": 12}
