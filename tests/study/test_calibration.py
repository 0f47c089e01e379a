"""What is measured is there and positive; what is extrapolated lies on the line."""

from typing import Any

import pytest
import torch

from melbo_ray.config import Config
from melbo_ray.evals.catalog import PER_VECTOR
from melbo_ray.study import calibration
from melbo_ray.study.calibration import calibrate, extrapolate
from melbo_ray.study.preflight import check
from tests.families import tiny


@pytest.fixture
def checked(tmp_path):
    model = tiny()
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "source_layer": 1,
        "target_layer": 2,
        "num_vectors": 5,
        "max_new_tokens": 3,
        "device": "cpu",
    }
    return check(Config(model=str(tmp_path), storage=str(tmp_path / "runs"), **options))


def test_this_machine_is_measured(checked):
    threads = torch.get_num_threads()
    machine = calibrate(checked, seconds=0.05)
    assert machine.device == "cpu"
    assert machine.flops > 1e8
    assert machine.bandwidth > 1e7
    assert set(machine.evaluations) == set(PER_VECTOR)
    assert all(seconds > 0 for seconds in machine.evaluations.values())
    assert machine.measured.startswith("2 vectors through 2 and 4 of 4 layers with random weights")
    assert torch.get_num_threads() == threads


def test_layers_that_are_too_large_are_not_timed(checked, monkeypatch):
    monkeypatch.setattr(calibration, "_ROOM", {"cpu": 1e4})
    machine = calibrate(checked, seconds=0.05)
    assert machine.evaluations == {}
    assert machine.measured.startswith("no evaluation was timed")


def test_a_time_is_extrapolated_along_the_line_and_does_not_fall():
    assert extrapolate((2, 1.0), (10, 3.0), 30) == pytest.approx(8.0)
    assert extrapolate((2, 1.0), (10, 3.0), 1) == pytest.approx(0.75)
    assert extrapolate((2, 1.0), (10, 0.9), 30) == 1.0
