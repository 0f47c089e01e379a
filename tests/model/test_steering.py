"""Logits with a vector on every row are those of transformers with a hook, one vector at a time."""

import warnings

import pytest
import torch

from melbo_ray.errors import UserError
from melbo_ray.model.hooks import steering
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.steering import Prompts, continuation_score, encode, target_log_probs
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
    monkeypatch.setattr("melbo_ray.model.steering.PASS_TOKENS", 30)
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


def test_several_continuations_share_a_row_that_is_longer_than_the_attention_window():
    model = tiny("mistral", sliding_window=8)
    prompt, forced = model.tokenize("longer than eight"), [encode(model, "abcd"), encode(model, "efg")]
    prompts = Prompts(model, [prompt], SOURCE, [forced])
    (logits,) = prompts.logits(directions(1))
    assert prompts.way == "branches"
    torch.testing.assert_close(logits, alone(model, prompt, forced, directions(1)[0]), rtol=1e-4, atol=1e-4)


def alone(model, prompt, forced, theta):
    """Logits along each continuation, read in a row of its own by plain transformers."""
    size = len(prompt) - 1
    rows = [plain_logits(model, torch.cat([prompt, branch]), SOURCE, theta)[size:-1] for branch in forced]
    return torch.cat(rows)


WAYS = {
    "bloom": "rows", "gemma4": "branches", "gemma4-shared": "whole", "lfm2": "rows", "llama4": "rows",
    "mamba2": "rows", "mpt": "rows", "qwen3-next": "rows",
}  # fmt: skip


@pytest.mark.parametrize(("family", "way"), WAYS.items())
def test_a_model_that_does_not_heed_the_mask_reads_one_continuation_a_row(family, way):
    model, thetas = tiny(family), directions(2)
    model.kept.clear()
    told, forced = tokens_of(model), [[encode(model, text) for text in ("def f", "x is")]] * 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = Prompts(model, told, SOURCE, forced)
        again = Prompts(model, told, SOURCE, forced)
    lines = [str(warning.message) for warning in caught if "costs time only" in str(warning.message)]
    assert (prompts.way, again.way) == (way, way)
    # Said once a model, in a line for each way that is not taken.
    assert len(lines) == ["branches", "rows", "whole"].index(way)
    assert not any("\n" in line for line in lines)
    for row, theta, logits in zip((1, 2), thetas, prompts.logits(thetas, torch.tensor([1, 2])), strict=True):
        torch.testing.assert_close(logits, alone(model, told[row], forced[row], theta), rtol=1e-3, atol=1e-3)


def test_the_stream_and_vectors_by_position_lie_alike_whichever_way_rows_do():
    model, (prompt,) = tiny(), tokens_of(tiny(), ["abcdef"])
    forced = [encode(model, text) for text in ("def f", "x is")]
    ways = [Prompts(model, [prompt], SOURCE, [forced], way) for way in ("branches", "rows", "whole")]
    theta = directions(ways[0].h_source.shape[1])[None]
    for other in ways[1:]:
        torch.testing.assert_close(other.h_source, ways[0].h_source, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(next(other.logits(theta)), next(ways[0].logits(theta)), rtol=1e-4, atol=1e-4)


def test_a_way_is_compared_again_on_rows_longer_than_any_before():
    model = tiny("llama", max_position_embeddings=200)
    model.kept.clear()
    name = f"rows after layer {SOURCE}"
    for text, compared in (("abc", 3), ("ab", 3), ("abcdef", 6)):
        Prompts(model, tokens_of(model, [text]), SOURCE)
        assert model.kept[name] == compared


@pytest.mark.filterwarnings("error:.*costs time only")
@every_family
def test_what_prompts_begin_with_is_read_once_under_a_vector(family):
    model, theta = tiny(family), directions(1)[0]
    told = tokens_of(model, ["a system turn, then How?", "a system turn, then a longer one", "a system turn, Hi"])
    forced = [[encode(model, text) for text in group] for group in (["def f", "x"], ["import"], ["abc", "d"])]
    prompts = Prompts(model, told, SOURCE, forced)
    list(prompts.under(theta))
    with counting(model.layers[-1]) as counted:
        logits = list(prompts.under(theta))
    for i in range(3):
        torch.testing.assert_close(logits[i], alone(model, told[i], forced[i], theta), rtol=1e-4, atol=1e-4)
    once, width = len("a system turn, "), prompts.h_source.shape[1]
    assert counted == [once, 3 * (width - once)]


def test_where_keys_and_values_do_not_serve_every_prompt_is_read_from_its_start():
    model, theta = tiny("lfm2"), directions(1)[0]
    model.kept.clear()
    told = tokens_of(model, ["the same, then How?", "the same, Hi"])
    with pytest.warns(UserWarning, match="read anew for each, which costs time only: the masks of conv"):
        logits = list(Prompts(model, told, SOURCE).under(theta))
    for tokens, found in zip(told, logits, strict=True):
        torch.testing.assert_close(found, plain_logits(model, tokens, SOURCE, theta)[-1:], rtol=1e-3, atol=1e-3)


class counting:  # noqa: N801 - reads as a verb
    """While it lasts, the tokens of each call of a layer are in the list."""

    def __init__(self, layer):
        self.counted = []
        self.handle = layer.register_forward_pre_hook(lambda _, args: self.counted.append(args[0][..., 0].numel()))

    def __enter__(self):
        return self.counted

    def __exit__(self, *_):
        self.handle.remove()


def test_layers_that_pass_on_more_than_one_stream_are_refused_in_a_line():
    model = tiny("gemma3n")
    with pytest.raises(UserError, match=r"between its layers runs .*not one stream"):
        Prompts(model, tokens_of(model), SOURCE)
    with pytest.raises(UserError, match=r"between its layers runs .*not one stream"):
        Slice(model, tokens_of(model), SOURCE, 3)


def test_an_empty_continuation_is_refused():
    with pytest.raises(UserError, match="continuation is empty"):
        encode(tiny(), "")
