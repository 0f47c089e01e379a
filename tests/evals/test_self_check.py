"""The self-check: quiet where we compute what transformers does, and one line where we do not."""

import copy
import dataclasses
import math

import pytest
import torch

from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.evals import self_check
from melbo_ray.evals.context import Study
from melbo_ray.model import kv_cache, plain
from melbo_ray.model.partial import lower
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts
from melbo_ray.runs import checks
from melbo_ray.runs.manifest import Manifest
from melbo_ray.study.preflight import check
from tests.families import every_family, tiny

CONCEPTS = [
    Concept(
        name=name, prompt=prompt, continuations=["def f", "x = 12", "ab"], words=["def"],
        held_out={"one": "Why?", "two": "What is it now?"}, neutral=["No?"],
    )
    for name, prompt in (("code", "How are you?"), ("alien", "Who?"))
]  # fmt: skip
CONFIG = Config(source_layer=0, target_layer=2, radius=3.0)


@pytest.fixture
def model():
    """Used by nobody else, so that nothing was compared on it before."""
    return dataclasses.replace(tiny())


def run(model, config=CONFIG, **options):
    return self_check.selfcheck(model, CONCEPTS, config, **options)


@every_family
def test_every_family_computes_what_plain_transformers_does(family):
    found = run(tiny(family))
    assert list(found) == ["slice", "logits", "scores", "texts"]
    assert all(part["error"] < 1e-4 for part in found.values())
    assert {part["verdict"] for part in found.values()} == {"exact"}
    # Loss, gradient and h_target of two θ on two prompts; the texts to their eighth token or a tie.
    assert (found["slice"]["compared"], found["logits"]["compared"], found["scores"]["compared"]) == (12, 7, 8)
    assert 20 <= found["texts"]["compared"] <= 24


@pytest.mark.parametrize(
    "options",
    [
        {"radius": "auto"}, {"z_from": 0}, {"z_from": 200}, {"block": 3}, {"norm_penalty": 0.3, "max_norm": 2.0},
        {"seed": 5, "source_layer": 1, "target_layer": 3},
    ],
)  # fmt: skip
def test_whatever_the_options_are(model, options):
    assert run(model, CONFIG.model_copy(update=options), whole=False)["slice"]["error"] < 1e-4


def test_half_precision_has_its_own_rounding():
    model = tiny()
    found = run(type(model).wrap(copy.deepcopy(model.network).bfloat16(), model.tokenizer))
    assert 1e-4 < found["slice"]["error"] <= found["slice"]["tolerance"] == pytest.approx(0.0884, rel=1e-3)


def test_of_the_layers_up_to_the_target_the_slice_is_checked(tmp_path):
    tiny().network.save_pretrained(tmp_path)
    tiny().tokenizer.save_pretrained(tmp_path)
    config = CONFIG.model_copy(update={"model": str(tmp_path), "device": "cpu"})
    assert list(run(lower(config), config, whole=False)) == ["slice"]


BREAKS = {
    "slice": (Slice, "h_target", lambda right: lambda *a, **k: right(*a, **k) + 0.1),
    "slice, by its gradient alone": (
        Slice, "_value_and_grad", lambda right: lambda *a, **k: (right(*a, **k)[0], right(*a, **k)[1] * 1.01),
    ),
    "slice, not a number": (Slice, "h_target", lambda right: lambda *a, **k: right(*a, **k) * math.nan),
    "logits": (
        Prompts, "logits", lambda right: lambda self, *a: [x if len(x) > 1 else x * 1.01 for x in right(self, *a)],
    ),
    "logits, where one vector serves all prompts": (
        Prompts, "under", lambda right: lambda *a: [x * 1.01 for x in right(*a)],
    ),
    "scores": (
        Prompts, "logits",
        # The last continuation sees the one before it.
        lambda right: lambda self, *a: [x if len(x) < 2 else torch.cat([x[:-1], x[-2:-1]]) for x in right(self, *a)],
    ),
    "texts": (
        self_check, "generate",
        lambda right: lambda *a, **k: [dataclasses.replace(t, tokens=t.tokens[:4] + [9] * 4) for t in right(*a, **k)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_wrong_ends_the_run_with_one_line(model, monkeypatch, broken):
    owner, name, spoil = BREAKS[broken]
    monkeypatch.setattr(owner, name, spoil(getattr(owner, name)))
    with pytest.raises(UserError, match=f"^self-check: {broken.split(',')[0]} are not what plain") as told:
        run(model)
    assert "\n" not in str(told.value)
    assert "tokens differ" in str(told.value) if broken == "texts" else "relative error" in str(told.value)


def test_what_cannot_be_computed_says_so(model, monkeypatch):
    def fail(*_):
        raise KeyError("sliding_attention")

    monkeypatch.setattr(Prompts, "logits", fail)
    with pytest.raises(UserError, match="self-check: logits cannot be computed on this model"):
        run(model)


def test_a_model_that_is_not_finite_itself_is_told_apart(model):
    with pytest.raises(UserError, match="own activations are not finite"):
        run(model, CONFIG.model_copy(update={"radius": math.inf}))


def test_what_falls_back_is_right_by_the_plain_way(model, monkeypatch):
    monkeypatch.setattr(kv_cache, "agree", lambda *_: False)
    with pytest.warns(UserWarning, match="keys and values are not kept"):
        found = run(model)
    assert (found["texts"]["verdict"], found["texts"]["error"]) == ("plain way", 0)
    assert "keys and values are not kept" in found["texts"]["reason"]
    assert found["logits"]["verdict"] == "exact"


def wrapped():
    """A model whose settings can be changed."""
    model = tiny()
    return type(model).wrap(copy.deepcopy(model.network), model.tokenizer)


def test_a_models_own_settings_of_sampling_do_not_count():
    model = wrapped()
    model.network.generation_config.repetition_penalty = 3.0
    assert run(model)["texts"]["error"] == 0
    assert model.network.generation_config.repetition_penalty == 3.0


def test_a_text_that_ends_ends_on_both_sides():
    model = wrapped()
    theta = self_check._thetas(model, float(CONFIG.radius), CONFIG)[0]
    written, _ = plain.text(model, model.tokenize("How are you?"), 0, theta, 8)
    model.network.generation_config.eos_token_id = written[2]
    ended, _ = plain.text(model, model.tokenize("How are you?"), 0, theta, 8)
    assert ended == [*written[:2], plain.END] == plain.reread(model, model.tokenize("How are you?"), 0, theta, 8)[0]
    assert run(model)["texts"]["error"] == 0


def test_where_generate_is_of_no_use_texts_are_read_anew(monkeypatch):
    model = wrapped()

    def refuse(*_, **__):
        raise ValueError("no cache of this kind")

    monkeypatch.setattr(model.network, "generate", refuse)
    assert run(model)["texts"]["error"] == 0


def test_a_tie_of_two_tokens_is_no_fault(model):
    logits = torch.randn(260, generator=torch.Generator().manual_seed(0))
    logits[[7, 8]] = torch.tensor([9.0, 9.0 - 1e-4])
    far = logits.clone()
    far[8] = 8.5
    assert self_check._differing([5, 8, 1, 1], [5, 7, 2, 2], [logits] * 4, model) == (0, 1)
    assert self_check._differing([5, 8, 1, 1], [5, 7, 2, 2], [far] * 4, model) == (3, 4)
    assert self_check._differing([5, 7], [5, 7, 2, 2], [logits] * 4, model) == (2, 4)
    ends = logits.clone()
    ends[model.end_tokens] = 9.0 - 1e-4
    assert self_check._differing([plain.END], [7, 2], [ends] * 2, model) == (0, 0)


def part(error, verdict="exact", reason="", compared=4):
    return {"error": error, "tolerance": 1e-3, "compared": compared, "verdict": verdict, "reason": reason}


def test_the_worst_of_all_workers_is_told():
    found = {}
    checks.merge(found, "chain", "a", {"slice": part(3e-7)})
    checks.merge(found, "evaluator", "a", {"slice": part(2e-7), "texts": part(0.0, compared=16)})
    checks.merge(found, "evaluator", "b", {"slice": part(1e-7, "plain way", "slow, which costs time only")})
    checks.merge(found, "evaluator", "b", {"slice": part(9e-7), "texts": part(0.0, compared=15)})
    assert found["evaluator"]["b"]["slice"]["error"] == 1e-7
    assert checks.worst(found)["texts"] == part(0.0, compared=15) | {"role": "evaluator", "host": "b"}
    assert checks.line(found) == "slice 1e-7 (the plain way), texts 15 of 15 tokens"
    assert checks.reasons(found) == ["slice by the plain way: slow, which costs time only"]
    assert checks.line({}) == ""


DATED = "{{ strftime_now('%S%f') }} {% for m in messages %}{{ m.content }}{% endfor %}:"


@pytest.fixture
def begun(tmp_path):
    """A worker of a run that has just begun, and what was checked; the model's template writes the time."""
    model = tiny()
    model.network.save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "model")
    config = Config(
        model=str(tmp_path / "model"), source_layer=0, target_layer=2, storage=str(tmp_path), run_id="run", device="cpu"
    )
    checked = check(config, CONCEPTS)
    worker = Worker(f"{tmp_path}/run", "run", checked.config, CONCEPTS, torch.get_num_threads())
    prompts = {concept.name: {"training": concept.prompt, **concept.held_out} for concept in CONCEPTS}
    manifest = Manifest(prompts=prompts, prompts_rendered=checked.rendered)
    return worker, manifest


def test_the_tokens_in_the_manifest_are_those_that_are_used(begun):
    worker, manifest = begun
    worker.run.write_manifest(manifest)
    answer = worker.ready()
    assert (answer["role"], list(answer["checks"])) == ("evaluator", ["slice", "logits", "scores", "texts"])
    for concept in CONCEPTS:
        study = Study(worker.model, worker.config, concept, "run", torch.ones(worker.model.d_model))
        rendered = manifest.prompts_rendered[concept.name]
        assert list(rendered) == ["training", "one", "two"]
        for name, prompt in rendered.items():
            assert study.tokens(name).tolist() == prompt.tokens
            assert worker.model.tokenizer(prompt.text, add_special_tokens=False)["input_ids"] == prompt.tokens


def test_a_worker_whose_tokenizer_makes_other_tokens_is_refused(begun):
    worker, manifest = begun
    manifest.prompts_rendered["code"]["one"].tokens[-1] += 1
    worker.run.write_manifest(manifest)
    with pytest.raises(UserError, match="makes other tokens of the prompt 'one' than this run was begun with"):
        worker.ready()
