import json

import numpy as np
import pytest
import torch

from melbo_ray.errors import UserError
from melbo_ray.search.contrast import pairs, read_pairs
from tests.families import tiny

PAIRS = [("xxxx", "abcd"), ("xyxy!", "bcd"), ("zz xx", "a long prompt")]


def written(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return str(path)


def activation(prompt):
    """After layer 1 the mean over all positions but the first, and the last; float64, from transformers alone."""
    model = tiny()
    states = model.network(model.tokenize(prompt)[None], output_hidden_states=True).hidden_states[2][0]
    states = states.detach().double().numpy()
    return np.stack([states[1:].mean(0), states[-1]])


def test_pairs_are_the_mean_difference_of_their_activations(tmp_path):
    lines = [json.dumps({"positive": positive, "negative": negative}) for positive, negative in PAIRS]
    path = written(tmp_path, *lines, "")
    assert read_pairs(path) == PAIRS
    expected = np.mean([activation(positive) - activation(negative) for positive, negative in PAIRS], axis=0)
    np.testing.assert_allclose(pairs(tiny(), path, source=1).numpy(), expected, atol=1e-5)
    assert torch.isfinite(pairs(tiny(), path, source=1)).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "has no pairs"),
        ("{", "line 1 of .* is no pair"),
        ('{"positive": "a b"}', "line 1 of .* is no pair"),
        ("[" * 100_000, "line 1 of .* is no pair"),
        ('["a", "b"]', "line 1 of .* is no pair"),
        ('{"positive": "a b", "negative": " "}', "not empty"),
        ('{"positive": "a b", "negative": 3}', "not empty"),
        ('{"positive": "a b", "negative": "c"}', "the prompt 'c' has no other"),
    ],
)
def test_what_is_no_pair_is_refused_in_a_line(tmp_path, line, said):
    with pytest.raises(UserError, match=said) as refusal:
        pairs(tiny(), written(tmp_path, line), source=1)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read pairs"):
        read_pairs(str(tmp_path / "none.jsonl"))
