"""Logits with a vector on every row are those of transformers with a hook, one vector at a time."""

import pytest
import torch

from melbo_ray.config import UserError
from melbo_ray.steer import Prompts, continuation_score, encode, steering, target_log_probs
from tests.families import D_MODEL, directions, every_family, plain_logits, tiny

SOURCE = 1
PROMPTS = ["How are you?", "Hi", "A longer prompt than the others"]


def tokens_of(model, texts=PROMPTS):
    return [model.tokenize(text) for text in texts]


@every_family
def test_logits_are_those_of_a_plain_forward_pass_with_a_hook(family):
    model, thetas = tiny(family), directions(5)
    rows = torch.tensor([0, 1, 2, 2, 0])
    prompts = tokens_of(model)
    for row, theta, logits in zip(rows, thetas, Prompts(model, prompts, SOURCE).logits(thetas, rows), strict=True):
        torch.testing.assert_close(logits, plain_logits(model, prompts[row], SOURCE, theta)[-1:], rtol=1e-4, atol=1e-4)


@every_family
def test_continuations_that_share_a_prompt_do_not_see_each_other(family):
    model, thetas = tiny(family), directions(3)
    texts = [["def f", "x"], ["import os"], ["a", "bc", "def"]]
    forced = [[encode(model, text) for text in group] for group in texts]
    prompts = Prompts(model, tokens_of(model), SOURCE, forced)
    for i, logits in enumerate(prompts.logits(thetas)):
        prompt = tokens_of(model)[i]
        alone = [
            plain_logits(model, torch.cat([prompt, branch]), SOURCE, thetas[i])[len(prompt) - 1 : -1]
            for branch in forced[i]
        ]
        torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
        assert prompts.targets[i].tolist() == torch.cat(forced[i]).tolist()


@every_family
def test_steering_by_zero_is_not_steering(family):
    model = tiny(family)
    tokens = tokens_of(model)[0]
    with torch.no_grad():
        plain = model.network(tokens[None]).logits[0]
        with steering(model, SOURCE, torch.zeros(1, D_MODEL)):
            assert torch.equal(model.network(tokens[None]).logits[0], plain)
    (logits,) = Prompts(model, [tokens], SOURCE).logits(torch.zeros(1, D_MODEL))
    torch.testing.assert_close(logits, plain[-1:], rtol=1e-4, atol=1e-5)


def test_a_row_of_a_batch_equals_the_row_alone_however_the_batch_is_cut(monkeypatch):
    model, thetas = tiny(), directions(7)
    prompts = Prompts(model, tokens_of(model)[:1], SOURCE)
    together = torch.stack(list(prompts.logits(thetas)))
    monkeypatch.setattr("melbo_ray.steer._TOKENS", 30)
    torch.testing.assert_close(torch.stack(list(prompts.logits(thetas))), together)


def test_a_vector_that_differs_by_position_is_added_by_position():
    model = tiny()
    (tokens,) = tokens_of(model, ["abcdef"])
    theta = directions(len(tokens))
    (logits,) = Prompts(model, [tokens], SOURCE).logits(theta[None])
    torch.testing.assert_close(logits, plain_logits(model, tokens, SOURCE, theta)[-1:], rtol=1e-4, atol=1e-4)


def test_the_source_layers_stream_is_transformers_hidden_state_one_higher():
    model = tiny()
    (tokens,) = tokens_of(model, ["abcdef"])
    hidden = model.network(tokens[None], output_hidden_states=True).hidden_states[SOURCE + 1]
    torch.testing.assert_close(Prompts(model, [tokens], SOURCE).h_source, hidden)


@every_family
def test_continuation_score_is_the_change_of_mean_log_probability_per_token(family):
    model, thetas = tiny(family), directions(3)
    prompt, texts = model.tokenize("How are you?"), ["def f():", "import"]

    def mean_log_prob(theta):
        values = []
        for text in texts:
            ids = torch.tensor(model.tokenizer(text)["input_ids"])
            log_probs = plain_logits(model, torch.cat([prompt, ids]), SOURCE, theta).double().log_softmax(-1)
            values += [float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)]
        return sum(values) / len(values)

    expected = [mean_log_prob(theta) - mean_log_prob(torch.zeros(D_MODEL)) for theta in thetas]
    score = continuation_score(model, prompt, texts, SOURCE, thetas)
    assert score.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_vector_that_is_not_finite_has_no_score_and_spoils_no_other():
    model, thetas = tiny(), directions(3)
    prompt = model.tokenize("How are you?")
    broken = thetas.clone()
    broken[1, 0] = torch.nan
    score = continuation_score(model, prompt, ["def"], SOURCE, broken)
    assert score.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(score[::2], continuation_score(model, prompt, ["def"], SOURCE, thetas[::2]))
    assert len(continuation_score(model, prompt, ["def"], SOURCE, thetas[:0])) == 0


def test_target_log_probs_reads_one_probability_a_row():
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    assert target_log_probs(logits, torch.tensor([0, 1])).exp().tolist() == pytest.approx([0.5, 0.75])


def hooks_and_patches(model):
    modules = list(model.network.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return hooks + sum("forward" in vars(module) for module in modules)


def test_no_hook_and_no_patch_outlives_an_exception():
    model = tiny("qwen2")
    prompts = Prompts(model, tokens_of(model), SOURCE)
    before = hooks_and_patches(model)
    with pytest.raises(RuntimeError), steering(model, SOURCE, directions(1, d_model=5)), torch.no_grad():
        model.network(tokens_of(model)[0][None])
    with pytest.raises(RuntimeError, match="in a later block"), failing(model.layers[3]):
        next(prompts.logits(directions(3)))
    assert hooks_and_patches(model) == before


def test_a_patch_of_someone_elses_is_put_back():
    model = tiny("qwen3")
    layer = model.layers[0]
    layer.forward = original = layer.forward
    list(Prompts(model, tokens_of(model), SOURCE).logits(directions(3)))
    assert vars(layer).pop("forward") is original


class failing:  # noqa: N801 - reads as a verb
    """Makes a layer raise while it lasts."""

    def __init__(self, layer):
        self.handle = layer.register_forward_pre_hook(self.fail)

    def fail(self, *_):
        raise RuntimeError("in a later block")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


def test_several_continuations_beyond_the_attention_window_are_refused_not_misread():
    model = tiny("mistral", sliding_window=8)
    prompt, forced = model.tokenize("longer than eight"), [encode(model, "ab"), encode(model, "cd")]
    with pytest.raises(ValueError, match="window of 8"):
        Prompts(model, [prompt], SOURCE, [forced])
    (logits,) = Prompts(model, [prompt], SOURCE, [forced[:1]]).logits(directions(1))
    expected = plain_logits(model, torch.cat([prompt, forced[0]]), SOURCE, directions(1)[0])[-3:-1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_continuation_is_refused():
    with pytest.raises(UserError, match="continuation is empty"):
        encode(tiny(), "")
