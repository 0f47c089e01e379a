"""A vector's row in the table `vectors`: there and back, to the bit."""

import io
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from melbo_ray.runs.manifest import Manifest
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.schema import SCHEMAS, table
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.vectors import BaseVector, SteeringVector, row, stored_vectors

D_MODEL = 11
CERTIFICATE: dict[str, Any] = {
    "norm": 3.25, "loss": 0.1, "relative_loss": 1 / 3, "relative_loss_from_0": 0.5, "relative_loss_from_1": None,
    "evaluations": 30, "stop_reason": "converged", "max_abs_cos": 1.23456789e-9, "seconds": 0.7, "seed": 2**62 + 1,
}  # fmt: skip


def theta(seed):
    """Values over the whole range of float32, some below the normal ones."""
    draws = np.random.default_rng(seed)
    return torch.from_numpy((draws.standard_normal(D_MODEL) * 10.0 ** draws.integers(-44, 38, D_MODEL)).astype("f4"))


def vector(index):
    return SteeringVector(index=index, theta=theta(index), **CERTIFICATE)


def parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    return buffer.getvalue()


def test_a_row_is_what_python_numbers_would_make_of_it_to_the_byte():
    keys = {"run_id": "one", "kind": "chain"}
    plain = [keys | {"index": n, "vector": theta(n).tolist()} | CERTIFICATE for n in (1, 2)]
    assert parquet(table("vectors", [row("one", "chain", vector(n)) for n in (1, 2)])) == parquet(
        table("vectors", plain)
    )


def test_a_base_has_of_a_certificate_its_norm_alone():
    found = row("one", "base", BaseVector(theta(0)))
    empty = dict.fromkeys(SCHEMAS["vectors"].names)
    keys = {"run_id": "one", "kind": "base", "index": 0, "norm": float(theta(0).norm())}
    plain = empty | keys | {"vector": theta(0).tolist()}
    assert parquet(table("vectors", [found])) == parquet(table("vectors", [plain]))


@pytest.mark.parametrize("published", [False, True])
def test_what_is_stored_comes_back_to_the_bit_without_the_vectors_of_evaluations(tmp_path, published):
    run = Run.open(str(tmp_path / "one"))
    nothing = stored_vectors(run, "code")
    assert (nothing.base, nothing.chain) == (None, [])
    run.commit(Unit.base("code"), {"vectors": table("vectors", [row("one", "base", BaseVector(theta(0)))])})
    for index in (2, 1, 3):
        run.commit(Unit.vector("code", index), {"vectors": table("vectors", [row("one", "chain", vector(index))])})
    shuffled = row("one", "shuffled", vector(1)) | {"seconds": None}
    run.commit(Unit("code", "shuffled", "whole", 1, 3), {"vectors": table("vectors", [shuffled])})
    if published:
        run.publish(Manifest(), lambda: None)
    found = stored_vectors(run, "code")
    assert torch.equal(found.base.theta, theta(0))
    assert [vector.index for vector in found.chain] == [1, 2, 3]
    for index, stored in enumerate(found.chain, 1):
        assert torch.equal(stored.theta, theta(index))
        rounded = {name: np.float32(value) for name, value in CERTIFICATE.items() if isinstance(value, float)}
        expected = CERTIFICATE | rounded | {"max_abs_cos": CERTIFICATE["max_abs_cos"]}
        assert {name: getattr(stored, name) for name in CERTIFICATE} == expected


@pytest.mark.parametrize("published", [False, True])
def test_reading_a_chain_takes_a_few_times_its_bytes_and_no_python_number_for_each(tmp_path, published):
    run, d_model, count = Run.open(str(tmp_path / "one")), 16384, 64
    for index in range(1, count + 1):
        wide = SteeringVector(index=index, theta=torch.randn(d_model), **CERTIFICATE)
        run.commit(Unit.vector("code", index), {"vectors": table("vectors", [row("one", "chain", wide)])})
    if published:
        run.publish(Manifest(), lambda: None)
    stored_vectors(run, "code")
    allocated = pa.total_allocated_bytes()
    tracemalloc.start()
    assert len(stored_vectors(run, "code").chain) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * d_model * count  # a list of them takes at least eight times
    assert pa.total_allocated_bytes() - allocated < 1000
