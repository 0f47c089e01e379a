from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from melbo_ray.concepts.loader import Concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.formats.reading import read_vectors
from melbo_ray.model.residual_slice import Slice
from melbo_ray.search.base_vectors import base_vector, maximise, objective, retract, tangent
from melbo_ray.search.candidates import Candidate
from melbo_ray.search.contrast import contrast
from melbo_ray.search.power import power
from melbo_ray.search.radius import calibrate
from melbo_ray.search.stages import finish
from melbo_ray.search.written import Written
from melbo_ray.seeds import derive_seed
from tests.families import D_MODEL, directions, plain_logits, tiny

CONCEPT = Concept(
    name="letters", prompt="a prompt of bytes", continuations=["xyz", "uvw"], words=["x"], contrast=["xxxx", "xyxy"],
    neutral=["abcd", "bcda e"], held_out={"one": "dcba", "two": "e bcd"}, neutral_texts=[],
)  # fmt: skip
OPTIONS: dict[str, Any] = {"source_layer": 1, "target_layer": 3, "radius": 4.0, "candidates": 5, "max_new_tokens": 4}
CALIBRATED: dict[str, Any] = OPTIONS | {"radius": "auto"}


def a_slice():
    return Slice(tiny(), [tiny().tokenize(CONCEPT.prompt)], source=1, target=3)


def plain_change(theta):
    """h_target(θ) − h_target(0), (seq, d_model) float64, from transformers and hooks of the test's own."""
    model, seen = tiny(), []
    for vector in (theta, torch.zeros(D_MODEL)):
        adder = model.layers[1].register_forward_hook(lambda _m, _a, out, vector=vector: out + vector)
        reader = model.layers[3].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
        with torch.no_grad():
            model.network(model.tokenize(CONCEPT.prompt)[None])
        adder.remove()
        reader.remove()
    return (seen[0] - seen[1]).double().numpy()


@pytest.mark.parametrize(("p", "q", "start"), [(2, 2, 0), (2, 2, 1), (4, 1, 0), (3, 2, 2)])
def test_the_objective_is_macks_with_the_inner_norm_over_positions(p, q, start):
    slice, thetas = a_slice(), directions(2, norm=4.0)
    unsteered = slice.h_target(torch.zeros(1, D_MODEL)).float()
    ours = objective(slice, thetas, Config(melbo_p=p, melbo_q=q, melbo_from=start, **OPTIONS), unsteered)
    for value, theta in zip(ours.tolist(), thetas, strict=True):
        over_positions = np.sqrt((plain_change(theta)[start:] ** 2).sum(axis=0))
        assert value == pytest.approx((over_positions**p).sum() ** (1 / q), rel=1e-4)


def test_at_p_q_2_the_objective_is_the_frobenius_norm_of_the_change():
    slice, theta = a_slice(), directions(1)
    unsteered = slice.h_target(torch.zeros(1, D_MODEL)).float()
    value = float(objective(slice, theta, Config(melbo_from=0, **OPTIONS), unsteered))
    assert value == pytest.approx(np.linalg.norm(plain_change(theta[0])), rel=1e-4)


def test_the_tangent_divides_by_the_squared_norm():
    theta, gradient = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(tangent(gradient, theta), torch.tensor([[0.0, 1.0]]))


def test_retraction_keeps_each_row_orthogonal_to_those_before_it_and_of_norm_r():
    rows = directions(4, norm=9.0)
    kept = retract(rows, 2.5)
    torch.testing.assert_close(kept @ kept.T, 2.5**2 * torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept[0], rows[0] / 9 * 2.5)
    assert all(float(new @ old) > 0 for new, old in zip(kept, rows, strict=True))


def climbed(slice, config, start=None):
    """The candidates at the end of their ascent."""
    *_, (_, thetas) = maximise(slice, config, "letters", config.radius, torch.empty(0, D_MODEL), start=start)
    return thetas


def test_candidates_rise_above_random_vectors_of_the_same_norm():
    slice, config = a_slice(), Config(**OPTIONS)
    found = climbed(slice, config)
    unsteered = slice.h_target(torch.zeros(1, D_MODEL)).float()
    torch.testing.assert_close(found @ found.T, 16 * torch.eye(5), atol=1e-3, rtol=0)
    random = objective(slice, directions(20, norm=4.0), config, unsteered).detach()
    assert float(objective(slice, found, config, unsteered)[0]) > float(random.max())


def test_candidates_are_repeatable_and_depend_on_the_seed():
    one, same, other = (climbed(a_slice(), Config(seed=seed, melbo_steps=3, **OPTIONS)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_ascent_may_start_at_the_leading_singular_vectors():
    slice = a_slice()
    leading, _ = finish(power(slice, 5, 1))
    one_step = Config(melbo_steps=1, **OPTIONS)
    along, at_random = ((climbed(slice, one_step, start) / 4 * leading).sum(-1).abs() for start in (leading, None))
    assert (along > 0.99).all()
    assert (at_random < 0.9).all()
    found = base_vector(slice, CONCEPT, Config(melbo_steps=1, melbo_start="power", base_index=0, **OPTIONS))
    assert abs(float(found.theta @ leading[0])) / 4 > 0.99


def test_candidates_are_judged_every_ten_steps_of_one_ascent():
    looks = list(maximise(a_slice(), Config(melbo_steps=25, **OPTIONS), "letters", 4.0, torch.empty(0, D_MODEL)))
    assert [steps for steps, _ in looks] == [5, 10, 15, 20, 25]
    shorter = climbed(a_slice(), Config(melbo_steps=20, **OPTIONS))
    torch.testing.assert_close(looks[3][1], shorter)
    found = base_vector(a_slice(), CONCEPT, Config(melbo_steps=25, **OPTIONS))
    assert [c.steps for c in found.candidates] == [steps for _ in range(3) for steps in (10, 20, 25) for _ in range(5)]


def test_an_ascent_in_small_passes_is_the_same(monkeypatch):
    whole = climbed(a_slice(), Config(melbo_steps=3, **OPTIONS))
    monkeypatch.setattr("melbo_ray.model.residual_slice.GRADIENT_TOKENS", 30)
    torch.testing.assert_close(climbed(a_slice(), Config(melbo_steps=3, **OPTIONS)), whole, rtol=1e-4, atol=1e-4)


def test_the_concept_score_is_the_steered_log_probability_minus_the_unsteered():
    config = Config(melbo_steps=3, **OPTIONS)
    found = base_vector(a_slice(), CONCEPT, config)
    base, candidates = found.theta, found.candidates
    (best,) = (candidate for candidate in candidates if candidate.taken)
    assert torch.equal(base, best.theta)
    assert [candidate.index for candidate in candidates] == list(range(len(candidates)))
    prompt, scores = tiny().tokenize(CONCEPT.prompt), []
    for theta in (best.theta, torch.zeros(D_MODEL)):
        log_probs = []
        for text in CONCEPT.continuations:
            forced = tiny().tokenizer(text, return_tensors="pt")["input_ids"][0]
            logits = plain_logits(tiny(), torch.cat([prompt, forced]), 1, theta).double().log_softmax(-1)
            log_probs += [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(forced)]
        scores.append(np.mean(log_probs))
    assert best.concept_score == pytest.approx(scores[0] - scores[1], abs=1e-4)


def test_base_index_takes_one():
    found = base_vector(a_slice(), CONCEPT, Config(melbo_steps=2, base_index=3, **OPTIONS))
    base, candidates = found.theta, found.candidates
    assert torch.equal(base, candidates[3].theta)
    assert [candidate.index for candidate in candidates if candidate.taken] == [3]
    with pytest.raises(UserError, match="15 candidates"):
        base_vector(a_slice(), CONCEPT, Config(melbo_steps=1, base_index=30, **OPTIONS))


def test_candidates_are_sought_again_beside_the_earlier_ones_until_one_writes_the_concept(monkeypatch):
    monkeypatch.setattr("melbo_ray.search.written._SENSE", -np.inf)
    monkeypatch.setattr("melbo_ray.search.written._LOOP", 0.0)
    monkeypatch.setattr("melbo_ray.search.candidates._WEAKER", (1.0,))
    monkeypatch.setattr("melbo_ray.search.candidates._STRONG", 0.0)
    config = Config(melbo_steps=3, **OPTIONS)
    first = climbed(a_slice(), config)
    all_there_are = base_vector(a_slice(), CONCEPT, config).candidates
    assert len(all_there_are) == 15  # nothing writes it: three times five
    thetas = torch.stack([candidate.theta for candidate in all_there_are])
    torch.testing.assert_close(thetas @ thetas.T, 16 * torch.eye(15), atol=1e-3, rtol=0)
    torch.testing.assert_close(thetas[:5], first)
    assert all_there_are[0].reason.endswith("does not write the concept")
    wanted = all_there_are[12].written.text
    monkeypatch.setattr("melbo_ray.search.written.score_text", lambda _concept, text: {"detected": text == wanted})
    found = base_vector(a_slice(), CONCEPT, config).candidates
    place = next(c.index for c in all_there_are if c.written.text == wanted)
    assert len(found) == 5 * (place // 5 + 1)
    assert next(candidate for candidate in found if candidate.taken).written.text == wanted
    assert all(torch.equal(c.theta, d.theta) for c, d in zip(found, all_there_are, strict=False))


def test_a_weak_base_is_kept_when_the_next_look_has_no_stronger_one(monkeypatch):
    kls = iter([1.0, 1.5, 1.2, 9.0])

    def judged(slice, concept, config, thetas, first, once):
        yield from ()
        text = Written("a text", True, -1.0, 1.0)
        return [Candidate(first, thetas[0], 1.0, 4.0, 0.0, next(kls), text, (text,))], False

    monkeypatch.setattr("melbo_ray.search.base_vectors._judged", judged)
    found = base_vector(a_slice(), CONCEPT, Config(melbo_steps=60, **OPTIONS))
    assert [(c.unsteered_kl, c.steps, c.taken) for c in found.candidates] == [
        (1.0, 10, False), (1.5, 20, True), (1.2, 30, False),
    ]  # fmt: skip


def test_contrast_is_the_difference_of_activations_over_all_positions_but_the_first_and_at_the_last():
    model = tiny()

    def mean(prompts):
        states = [
            model.network(model.tokenize(p)[None], output_hidden_states=True).hidden_states[2][0].detach().double()
            for p in prompts
        ]
        return np.mean([[state[1:].numpy().mean(0), state[-1].numpy()] for state in states], axis=0)

    expected = mean(CONCEPT.contrast) - mean(CONCEPT.neutral)
    np.testing.assert_allclose(contrast(model, CONCEPT, source=1).numpy(), expected, atol=1e-5)
    found = base_vector(a_slice(), CONCEPT, Config(base="contrast", **OPTIONS))
    units = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    thetas = np.stack([candidate.theta.numpy() for candidate in found.candidates])
    np.testing.assert_allclose(thetas, units * 4, atol=1e-4)  # at R = 4, which was given
    assert any(np.array_equal(found.theta, theta) for theta in thetas)


def test_a_contrast_is_judged_at_rising_norms_from_a_calibrated_radius_on(monkeypatch):
    """At R itself a mean difference rarely shows the concept; twice and four times R break a sensitive model."""

    def judged(slice, concept, config, thetas, first, once):
        yield from ()
        texts = [Written("a text", float(theta.norm()) > 1.9 * r, -1.0, 1.0) for theta in thetas]
        return [
            Candidate(first + i, theta, 1.0, float(theta.norm()), 0.0, 2.0, text, (text,))
            for i, (theta, text) in enumerate(zip(thetas, texts, strict=True))
        ], False

    r = calibrate(a_slice(), derive_seed(0, CONCEPT.name, 0, "radius")).radius
    monkeypatch.setattr("melbo_ray.search.base_vectors._judged", judged)
    found = base_vector(a_slice(), CONCEPT, Config(base="contrast", **CALIBRATED))
    np.testing.assert_allclose([c.radius / r for c in found.candidates], np.repeat([1, 2**0.5, 2], 2), rtol=1e-5)
    np.testing.assert_allclose(found.theta.norm(), 2 * r, rtol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
@pytest.mark.parametrize("shape", [(D_MODEL,), (3, D_MODEL)])
def test_vectors_are_read_from_files(tmp_path, suffix, shape):
    vectors, path = torch.randn(shape, generator=torch.Generator().manual_seed(0)), tmp_path / f"v{suffix}"
    match suffix:
        case ".safetensors":
            save_file({"theta": vectors}, path)
        case ".npy":
            np.save(path, vectors.numpy())
        case ".pt":
            torch.save(vectors, path)
    assert torch.equal(read_vectors(str(path), D_MODEL), vectors.reshape(-1, D_MODEL))


class Hostile:
    def __reduce__(self):
        return print, ("this pickle was executed",)


def test_a_file_of_vectors_cannot_run_code(tmp_path, capsys):
    torch.save(Hostile(), tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    for name in ("v.pt", "v.npy"):
        with pytest.raises(UserError, match="cannot read vectors"):
            read_vectors(str(tmp_path / name), D_MODEL)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: str(folder / "none.npy"), "cannot read vectors"),
        (lambda folder: "nonsense", "expected melbo, promotion, contrast, "),
        (lambda folder: saved(folder, np.ones(D_MODEL + 1)), f"d_model is {D_MODEL}"),
        (lambda folder: saved(folder, np.ones((2, 2, D_MODEL))), "shape"),
        (lambda folder: saved(folder, np.zeros(D_MODEL)), "norm 0"),
        (lambda folder: saved(folder, np.full(D_MODEL, np.nan)), "not finite"),
    ],
)
def test_files_that_will_not_do_are_refused_in_a_line(tmp_path, make, said):
    with pytest.raises(UserError, match=said) as refusal:
        base_vector(a_slice(), CONCEPT, Config(base=make(tmp_path), **OPTIONS))
    assert "\n" not in str(refusal.value)


def saved(folder, array):
    np.save(folder / "v.npy", array)
    return str(folder / "v.npy")


def test_a_contrast_with_a_prompt_of_one_token_is_refused_in_a_line():
    short = CONCEPT.model_copy(update={"contrast": ["Write code.", "x"]})
    with pytest.raises(UserError, match="leaves out the first token, and the prompt 'x' has no other"):
        contrast(tiny(), short, source=1)


def test_a_prompt_of_one_token_has_a_base_where_its_token_counts():
    short = CONCEPT.model_copy(update={"prompt": "x"})
    base = base_vector(
        Slice(tiny(), [tiny().tokenize("x")], 1, 3), short, Config(melbo_from=0, melbo_steps=1, **OPTIONS)
    ).theta
    assert torch.isfinite(base).all()
