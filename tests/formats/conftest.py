"""A run of a tiny model in storage: its model in a folder, a base, four vectors, the evaluation `kl` of them."""

from dataclasses import dataclass

import pytest
import torch

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.evals import kl
from melbo_ray.evals.context import Study, Vectors
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs import schema
from melbo_ray.runs.manifest import Manifest, RenderedPrompt
from melbo_ray.runs.run_store import Run
from melbo_ray.runs.work_unit import Unit
from melbo_ray.search.vectors import BaseVector, SteeringVector, row
from melbo_ray.study.preflight import defined, recorded
from tests.families import D_MODEL, directions, tiny

SOURCE = 1


@dataclass(frozen=True)
class Stored:
    """A run and what was put into it."""

    url: str
    model: LanguageModel
    thetas: torch.Tensor
    concept: Concept


@pytest.fixture(scope="session")
def concept():
    return Concept(
        name="code", prompt="How are you?", continuations=["def f():"], words=["def"], held_out={"one": "Why?"},
        neutral_texts=[],
    )  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny model, loaded from the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("model")
    tiny().network.save_pretrained(folder)
    tiny().tokenizer.save_pretrained(folder)
    return LanguageModel.load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def stored(tmp_path_factory, model, concept):
    url = str(tmp_path_factory.mktemp("runs") / "one")
    config = Config(model=model.name, source_layer=SOURCE, target_layer=3, radius=5.0, run_id="one", device="cpu")
    thetas = torch.cat([directions(1, norm=5.0, seed=1), directions(4, norm=4.0, seed=2)])
    run, tokens = Run.open(url), model.tokenize(concept.prompt)
    rendered = RenderedPrompt(text=model.rendered(concept.prompt), tokens=tokens.tolist())
    run.write_manifest(
        Manifest(
            run_id="one",
            model=model.name,
            fingerprint=model.fingerprint(),
            config=recorded(config),
            definitions=defined([concept]),
            prompts_rendered={"code": {"training": rendered}},
        )
    )
    facts = dict.fromkeys(("loss", "relative_loss", "relative_loss_from_0", "relative_loss_from_1", "seconds"), 0.5)
    chain = [
        SteeringVector(
            index=index,
            theta=theta,
            norm=float(theta.norm()),
            evaluations=3,
            stop_reason="converged",
            max_abs_cos=0.0,
            seed=0,
            **facts,
        )
        for index, theta in enumerate(thetas[1:], 1)
    ]
    study = Study(model, config, concept, "one", thetas[0])
    for kind, rows in (("base", [BaseVector(thetas[0])]), ("chain", chain)):
        first = 0 if kind == "base" else 1
        indices = range(first, first + len(rows))
        for index, vector in zip(indices, rows, strict=True):
            unit = Unit(concept.name, kind, kind, index, index)
            run.commit(unit, {"vectors": schema.table("vectors", [row("one", kind, vector)])})
        found = kl.run(study, Vectors(kind, list(indices), thetas[first : first + len(rows)]))["kl"]
        run.commit(Unit(concept.name, "kl", kind, first, indices[-1]), {"kl": schema.table("kl", found)})
    assert thetas.shape[1] == D_MODEL
    return Stored(url, model, thetas, concept)
