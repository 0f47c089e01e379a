"""Steering any transformers model: against hooks of the test's own, whatever the scope, the padding and the cache."""

import contextlib
import dataclasses
import warnings
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from melbo_ray import UserError, steer
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.runs.schema import Certificate
from melbo_ray.runs.vectors import RunVector, Site
from tests.families import D_MODEL, FAMILIES, directions, plain_logits, tiny

LAYER = 1
THETA = directions(1)[0]
SHORT, LONG = torch.arange(40, 46), torch.arange(60, 72)


@contextlib.contextmanager
def plainly(layer, change):
    """A hook of the test's own: `change(h)` takes the place of what the layer puts out."""
    handle = layer.register_forward_hook(
        lambda _m, _a, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
    )
    yield
    handle.remove()


def network(model) -> Any:
    return model.network


def vector(theta, layer=LAYER, fingerprint=None):
    known: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Certificate))
    return RunVector(index=1, theta=theta.numpy(), site=Site(layer, "tiny", fingerprint), **known)


def hooks(net):
    """Number of hooks, but for those that transformers leaves on a model whose layers' outputs it was asked for."""
    found = [hook for m in net.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    ours = [hook for hook in found if not getattr(hook, "__module__", "").startswith("transformers")]
    return len(ours) + ("generate" in vars(net))


def logits(net, tokens, **arguments):
    with torch.no_grad():
        return net(input_ids=tokens if tokens.ndim == 2 else tokens[None], **arguments).logits


def padded():
    """Two prompts in one batch, the short one padded on the left."""
    tokens = torch.full((2, len(LONG)), 257)
    tokens[0, -len(SHORT) :], tokens[1] = SHORT, LONG
    return tokens, (tokens != 257).long()


def written(net, tokens, mask=None, **options):
    """The greedy continuation of each row, and its logits."""
    found = net.generate(
        tokens, attention_mask=torch.ones_like(tokens) if mask is None else mask, do_sample=False, max_new_tokens=6,
        eos_token_id=None, pad_token_id=257, return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return found.sequences[:, tokens.shape[1] :], torch.stack(found.logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_plain_hook(family):
    model, theta = tiny(family), directions(1)[0]
    with steer(network(model), theta, layer=LAYER):
        found = logits(network(model), LONG)[0]
    torch.testing.assert_close(found, plain_logits(model, LONG, LAYER, theta), rtol=0, atol=0)
    assert hooks(network(model)) == 0


def test_a_runs_vector_knows_its_layer_and_weights_and_scale_multiply():
    model, (one, two) = tiny(), directions(2)
    with steer(model, [vector(one), vector(two)], weights=[0.5, -2.0], scale=3.0):
        found = logits(network(model), LONG)[0]
    expected = plain_logits(model, LONG, LAYER, 3.0 * (0.5 * one - 2.0 * two))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_zero_is_unsteered_and_a_context_within_a_context_adds():
    model, (one, two) = tiny(), directions(2)
    unsteered = logits(network(model), LONG)
    with steer(model, one, layer=LAYER):
        alone = logits(network(model), LONG)
        with steer(model, two, layer=LAYER), steer(model, np.zeros(D_MODEL), layer=0):
            both = logits(network(model), LONG)
        assert torch.equal(logits(network(model), LONG), alone)
    with steer(model, [one, two], layer=LAYER):
        torch.testing.assert_close(logits(network(model), LONG), both, rtol=1e-5, atol=1e-5)
    with steer(model, one, layer=LAYER, scale=0.0):
        assert torch.equal(logits(network(model), LONG), unsteered)
    assert torch.equal(logits(network(model), LONG), unsteered)
    assert not torch.equal(alone, unsteered)


def test_vectors_of_several_layers_each_act_at_their_own():
    model, (one, two) = tiny(), directions(2)
    with steer(model, one, layer=0), steer(model, two, layer=2):
        expected = logits(network(model), LONG)
    with steer(model, [vector(one, layer=0), vector(two, layer=2)]):
        assert torch.equal(logits(network(model), LONG), expected)


def test_ablated_vectors_leave_nothing_in_their_span_whatever_their_angles():
    model, (one, two) = tiny(), directions(2)
    basis = torch.linalg.qr(torch.stack([one, one + 0.1 * two]).double().T).Q.T
    expected_of = lambda h: (h.double() - (h.double() @ basis.T) @ basis).float()  # noqa: E731
    with plainly(model.layers[LAYER], expected_of):
        expected = logits(network(model), LONG)
    with steer(model, [one, one + 0.1 * two, 2 * one], layer=LAYER, operation="ablate"):
        torch.testing.assert_close(logits(network(model), LONG), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ["add", "ablate"])
def test_rows_of_a_batch_are_the_rows_alone(operation):
    model, (one, two) = tiny(), directions(2)
    batch = LONG.expand(3, -1)
    with steer(model, [one, None, two], layer=LAYER, per_row=True, operation=operation):
        found = logits(network(model), batch)
    for row, theta in zip(found, (one, None, two), strict=True):
        with contextlib.nullcontext() if theta is None else steer(model, theta, layer=LAYER, operation=operation):
            torch.testing.assert_close(row, logits(network(model), LONG)[0], rtol=1e-4, atol=1e-4)


def scopes(prompt_length):
    """Each scope as `steer` takes it, and the positions that it means in a text with this prompt."""
    some = [0, 2, prompt_length - 1, prompt_length + 1]
    return {
        "all": ("all", lambda at: torch.ones_like(at, dtype=torch.bool)),
        "prompt": ("prompt", lambda at: at < prompt_length),
        "generated": ("generated", lambda at: at >= prompt_length),
        "positions": ([0, 2, -1, prompt_length + 1], lambda at: torch.isin(at, torch.tensor(some))),
    }


def greedily(model, tokens, theta, of):
    """Greedy text and logits from passes over the whole text, θ added at the positions `of` by a plain hook."""
    text, read = tokens, []
    for _ in range(6):
        where = of(torch.arange(len(text)))
        with plainly(model.layers[LAYER], lambda h, w=where: h + w[None, :, None] * theta):
            read.append(logits(network(model), text)[0, -1])
        text = torch.cat([text, read[-1].argmax()[None]])
    return text[len(tokens) :], torch.stack(read)


WAYS = [("llama", {}), ("gpt2", {}), ("gemma3", {}), ("llama", {"use_cache": False})]
WAYS += [(family, {"cache_implementation": "static"}) for family in ("llama", "gemma3")]


@pytest.mark.parametrize(("family", "options"), WAYS, ids=str)
@pytest.mark.parametrize("scope", ["all", "prompt", "generated", "positions"])
def test_each_scope_is_what_a_plain_hook_does_at_those_positions_left_padded_too(family, scope, options):
    model, theta = tiny(family), directions(1)[0]
    tokens, mask = padded()
    for row, prompt in enumerate((SHORT, LONG)):
        named, of = scopes(len(prompt))[scope]
        with steer(model, theta, layer=LAYER, tokens=named):
            texts, read = written(network(model), tokens, mask, **options)
        expected_text, expected = greedily(model, prompt, theta, of)
        torch.testing.assert_close(read[row], expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(texts[row], expected_text)
    assert hooks(network(model)) == 0


def test_beams_and_samples_of_a_row_share_its_vector():
    model, thetas = tiny(), directions(2, norm=6.0)
    tokens, mask = padded()
    options = {"attention_mask": mask, "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}
    options |= {"do_sample": False, "pad_token_id": 257, "eos_token_id": None}
    with steer(model, list(thetas), layer=LAYER, per_row=True):
        together = network(model).generate(tokens, **options)
    for row in range(2):
        with steer(model, thetas[row], layer=LAYER):
            alone = network(model).generate(tokens, **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone[2 * row : 2 * row + 2])


def test_a_cache_of_ones_own_continues_the_prompt():
    model, theta = tiny(), directions(1)[0]
    with steer(model, theta, layer=LAYER, tokens="prompt"):
        first = network(model)(LONG[None], use_cache=True)
        found = logits(network(model), SHORT[None, :1], past_key_values=first.past_key_values)[0, -1]
    where = torch.arange(len(LONG) + 1) < len(LONG)
    with plainly(model.layers[LAYER], lambda h: h + where[None, :, None] * theta):
        expected = logits(network(model), torch.cat([LONG, SHORT[:1]]))[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def raising(*_, **__):
    raise RuntimeError("own")


def test_hooks_go_when_the_body_raises_and_generate_stays_the_callers_own():
    model = tiny()
    network(model).generate = own = raising
    try:
        with pytest.raises(RuntimeError, match="own"), steer(model, THETA, layer=LAYER):
            network(model).generate()
        assert network(model).generate is own
    finally:
        del network(model).generate
    assert hooks(network(model)) == 0


def test_a_model_with_a_device_map_is_steered():
    model, theta = tiny(), directions(1)[0]
    other: Any = AutoModelForCausalLM.from_config(network(model).config)
    other.load_state_dict(network(model).state_dict())
    other = accelerate.dispatch_model(other.eval(), {"": "cpu"}, force_hooks=True)
    with steer(other, theta, layer=LAYER):
        found = logits(other, LONG)[0]
    torch.testing.assert_close(found, plain_logits(model, LONG, LAYER, theta), rtol=0, atol=0)


def test_weights_that_lie_elsewhere_are_not_compared():
    with torch.device("meta"):
        elsewhere = AutoModelForCausalLM.from_config(network(tiny()).config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(elsewhere, vector(THETA, fingerprint="0" * 64)):
            pass


def test_half_precision_adds_in_float32():
    model, theta = tiny(), directions(1)[0]
    other: Any = AutoModelForCausalLM.from_config(network(model).config).to(torch.bfloat16).eval()
    with plainly(other.model.layers[LAYER], lambda h: (h.float() + theta).bfloat16()):
        expected = logits(other, LONG)
    with steer(other, theta, layer=LAYER):
        assert torch.equal(logits(other, LONG), expected)


def test_another_models_vector_is_a_warning_and_its_own_is_none():
    model, theta = tiny(), directions(1)[0]
    with (
        pytest.warns(UserWarning, match="found on 'tiny', and this model has other weights"),
        steer(model, vector(theta, fingerprint="0" * 64)),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(model, vector(theta, fingerprint=model.fingerprint())):
            pass


BAD = {
    "no model": (lambda: torch.nn.Linear(2, 2), THETA, {}, "cannot steer Linear"),
    "compiled": (lambda: torch.compile(network(tiny())), THETA, {"layer": 1}, "compiled"),
    "d_model": (tiny, torch.zeros(7), {"layer": 1}, "shape 7, the model's d_model is 32"),
    "a number": (tiny, 3.0, {"layer": 1}, "shape of a number"),
    "text": (tiny, object(), {"layer": 1}, "no steering vector"),
    "no layer": (tiny, THETA, {}, "give `layer`"),
    "layer out of range": (tiny, THETA, {"layer": 4}, "layer 4 is out of range"),
    "negative layer": (tiny, THETA, {"layer": -1}, "out of range"),
    "not finite": (tiny, THETA * float("nan"), {"layer": 1}, "not finite"),
    "operation": (tiny, THETA, {"layer": 1, "operation": "clamp"}, "expected add or ablate"),
    "scope": (tiny, THETA, {"layer": 1, "tokens": "some"}, "expected all, prompt, generated"),
    "no positions": (tiny, THETA, {"layer": 1, "tokens": []}, "`tokens` is empty"),
    "weights": (tiny, [THETA], {"layer": 1, "weights": [1.0, 2.0]}, "2 for 1 vectors"),
    "ablation weights": (tiny, THETA, {"layer": 1, "weights": [1.0], "operation": "ablate"}, "takes none"),
    "rows of one": (tiny, THETA, {"layer": 1, "per_row": True}, "expects a sequence"),
    "nothing": (tiny, [], {"layer": 1}, "no vectors"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "vectors", "options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_steered_is_one_error_and_no_hook(model, vectors, options, message):
    with pytest.raises(UserError, match=message), steer(model(), vectors, **options):
        pass
    assert hooks(network(tiny())) == 0


def test_a_layer_that_was_compiled_is_refused():
    model = tiny(num_hidden_layers=3)
    model.layers[0].compile(backend="eager")
    try:
        with pytest.raises(UserError, match="compiled"), steer(model, THETA, layer=1):
            pass
    finally:
        model.layers[0]._compiled_call_impl = None


def test_other_rows_than_vectors_is_one_error():
    model = tiny()
    with (
        steer(model, [THETA, THETA], layer=LAYER, per_row=True),
        pytest.raises(UserError, match="2 vectors for 3 rows"),
    ):
        logits(network(model), LONG.expand(3, -1))
    assert hooks(network(model)) == 0


def test_a_wrapped_model_with_layers_of_its_own_is_steered_there():
    net = network(tiny())
    model = LanguageModel.wrap(net, tiny().tokenizer, layers="model.layers")
    with steer(model, THETA, layer=LAYER):
        found = logits(net, LONG)[0]
    assert torch.equal(found, plain_logits(model, LONG, LAYER, THETA))
