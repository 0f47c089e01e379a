"""What an option names, and what a chain avoids: against mean differences, an SVD and projections of the tests' own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.chain import chain
from melbo_ray.search.given import avoided, check_given, given
from melbo_ray.search.stages import finish
from tests.families import D_MODEL, directions, tiny
from tests.stages import LAYER, write_run
from tests.studies import write_part

CONCEPT = Concept(
    name="code", prompt="How is it?", continuations=["def"], words=["def"], contrast=["abcd", "bcde!"],
    neutral=["xyz", "zz xx"],
)  # fmt: skip
BASE = directions(1)[0]
OPTIONS: dict[str, Any] = {
    "source_layer": LAYER, "target_layer": 3, "max_evaluations": 12, "max_relative_loss": 1e6, "num_vectors": 3,
}  # fmt: skip


def a_run(folder, num_vectors=4):
    """The URL of a stored run of the concept."""
    run = write_run(folder, num_vectors=num_vectors)
    manifest = json.loads((run / "run.json").read_text()) | {"definitions": {"code": CONCEPT.model_dump()}}
    (run / "run.json").write_text(json.dumps(manifest))
    part = run / "vectors/concept=code/part-0.parquet"
    rows = [
        {name: (1, "converged")[name == "stop_reason"] if value is None else value for name, value in row.items()}
        for row in pq.ParquetFile(part).read().to_pylist()
    ]
    part.unlink()
    write_part(run, "vectors", "code", rows, "part-base-00000")
    return str(run)


def a_slice():
    return Slice(tiny(), [tiny().tokenize(CONCEPT.prompt)], source=LAYER, target=3)


def outside(rows, vector):
    """Norm of the part of `vector` outside the span of the rows, relative, by least squares in float64."""
    rows, vector = np.asarray(rows, np.float64), np.asarray(vector, np.float64)
    solution = np.linalg.lstsq(rows.T, vector, rcond=None)[0]
    return np.linalg.norm(vector - solution @ rows) / np.linalg.norm(vector)


def mean_differences():
    """Of the concept's prompts and the neutral ones, over positions and at the last: transformers alone, float64."""

    def mean(prompts):
        tokens = [tiny().tokenize(text)[None] for text in prompts]
        states = [tiny().network(ids, output_hidden_states=True).hidden_states[LAYER + 1][0] for ids in tokens]
        states = [state.detach().double().numpy() for state in states]
        return np.mean([[state[1:].mean(0), state[-1]] for state in states], axis=0)

    return mean(CONCEPT.contrast) - mean(CONCEPT.neutral)


def leading_vectors(count):
    """Right singular vectors of ∂ h_target / ∂ θ at 0, positions from 1, by central differences and an SVD, float64."""
    slice, step = a_slice(), 0.02
    ends = [slice.h_target(sign * step * torch.eye(D_MODEL))[:, 1:].flatten(1).double() for sign in (1, -1)]
    jacobian = ((ends[0] - ends[1]) / (2 * step)).T
    return torch.linalg.svd(jacobian, full_matrices=False)[2][:count].detach().numpy()


def chain_avoiding(name):
    """The directions avoided and the chain."""
    options = Config(**OPTIONS, orthogonal_to=name)
    rows = finish(avoided(a_slice(), CONCEPT, options, BASE))
    return rows, list(chain(a_slice(), torch.cat([BASE[None], rows]), options))


def test_a_chain_avoids_the_mean_differences_of_its_concept():
    both, (rows, found) = mean_differences(), chain_avoiding("contrast")
    assert len(rows) == 2
    assert (rows @ BASE).abs().max() < 1e-6
    for expected in both:
        assert outside([BASE.numpy(), *rows.numpy()], expected) < 1e-5
        for vector in found:
            assert abs(vector.theta.double().numpy() @ expected) / np.linalg.norm(expected) / vector.norm < 1e-6


def test_a_chain_avoids_the_leading_singular_vectors_of_the_slice():
    expected, (rows, found) = leading_vectors(4), chain_avoiding("power/4")
    assert len(rows) == 4
    assert max(outside([BASE.numpy(), *rows.numpy()], vector) for vector in expected) < 0.05
    free = list(chain(a_slice(), BASE, Config(**OPTIONS)))
    shares = [[np.linalg.norm(expected @ v.theta.numpy()) / v.norm for v in each] for each in (found, free)]
    assert max(shares[0]) < 0.05
    assert max(shares[1]) > 0.1


def test_a_chain_avoids_the_vectors_of_another_run_or_their_mean(tmp_path):
    url = a_run(tmp_path)
    stored = np.array([(3 + n) * theta.numpy() for n, theta in enumerate(directions(5, norm=1.0))])
    for name, expected in (("mean", stored[1:].mean(0, keepdims=True)), ("2", stored[2:3]), ("", stored)):
        for concept in ("code", ""):  # without a name it is the chain's own
            whole = f"{url}#{concept}" + (f"/{name}" if name else "")
            found = finish(given(a_slice(), CONCEPT, Config(orthogonal_to=whole), "orthogonal_to"))
            np.testing.assert_allclose(found, expected, atol=1e-5)
    rows, found = chain_avoiding(f"{url}#/mean")
    assert outside([BASE.numpy(), rows[0].numpy()], stored[1:].mean(0)) < 1e-5
    assert max(abs(vector.theta.numpy() @ stored[1:].mean(0)) / vector.norm for vector in found) < 1e-5


def test_a_file_may_name_the_base_and_a_direction_twice(tmp_path):
    own = directions(3, seed=5)
    np.save(tmp_path / "avoid.npy", torch.cat([own, BASE[None], 2 * own[:1]]).numpy())
    rows = finish(avoided(a_slice(), CONCEPT, Config(orthogonal_to=str(tmp_path / "avoid.npy")), BASE))
    assert rows.shape == (3, D_MODEL)
    torch.testing.assert_close(rows @ torch.cat([rows, BASE[None]]).T, torch.eye(3, 4), atol=1e-6, rtol=0)
    assert max(outside([BASE.numpy(), *rows.numpy()], direction) for direction in own.numpy()) < 1e-6
    assert finish(avoided(a_slice(), CONCEPT, Config(), BASE)).shape == (0, D_MODEL)


def test_the_number_of_singular_vectors_may_be_said_of_a_base_too():
    two = finish(given(a_slice(), CONCEPT, Config(base="power/2")))
    half = finish(given(a_slice(), CONCEPT, Config(base="power", candidates=4)))
    assert two.shape == half.shape == (2, D_MODEL)
    torch.testing.assert_close(two, half)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"orthogonal_to": "melbo"}, "`orthogonal_to` is 'melbo': expected contrast, power/16, pairs"),
        ({"orthogonal_to": "power"}, "expected contrast, power/16"),
        ({"orthogonal_to": "power/0"}, "expected contrast, power/16"),
        ({"orthogonal_to": "power/2", "dtype": "bfloat16"}, "give `dtype` float32, not bfloat16"),
        ({"orthogonal_to": "contrast"}, "'code' has no contrast prompts"),
        ({"orthogonal_to": "x.bin"}, "expected contrast"),
        ({"orthogonal_to": "FOLDER/zero.npy"}, "norm 0 or not finite"),
        ({"orthogonal_to": "FOLDER/none.npy"}, "cannot read vectors"),
        ({"orthogonal_to": "FOLDER/study#/9"}, "no vector 9: it has 5, from 0"),
        ({"orthogonal_to": "FOLDER/study#alien/mean"}, "no concept 'alien'"),
        ({"orthogonal_to": "FOLDER/study#/middle"}, "is no vector of a run"),
        ({"orthogonal_to": "FOLDER/empty#/mean"}, "has no chain"),
    ],
)
def test_what_cannot_be_had_is_refused_in_a_line(tmp_path, options, said):
    a_run(tmp_path)
    Path(a_run(tmp_path / "more", num_vectors=0)).rename(tmp_path / "empty")
    np.save(tmp_path / "zero.npy", np.zeros((1, D_MODEL), np.float32))
    options = {name: value.replace("FOLDER", str(tmp_path)) for name, value in options.items()}
    concept = CONCEPT.model_copy(update={"contrast": []})
    with pytest.raises(UserError, match=said) as refusal:
        check_given(Config(**options, source_layer=LAYER, target_layer=3), concept, D_MODEL, "orthogonal_to")
    assert "\n" not in str(refusal.value)


def test_directions_are_counted_where_they_are_known(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"positive": "ab", "negative": "cd"}))
    np.save(tmp_path / "rows.npy", torch.cat([directions(3), directions(2)]).numpy())
    counts = {"contrast": 2, "power/7": 7, str(tmp_path / "pairs.jsonl"): 2, str(tmp_path / "rows.npy"): 3}
    for name, count in counts.items():
        assert check_given(Config(orthogonal_to=name), CONCEPT, D_MODEL, "orthogonal_to") == count
