"""Generation with a vector on every row is transformers' own with a hook, one prompt and one vector at a time."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from benchmarks.shapes import SHAPES
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.sampling import Request, choose, default_slots, generate, slot_bytes, width
from tests.families import D_MODEL, END, byte_tokenizer, directions, every_family, tiny

SOURCE = 1
PROMPTS = ["How are you?", "Hi", "A longer prompt than the others, by far", "Why?"]


def requests_of(model, count=8, norm=3.0, temperature=0.0):
    thetas, units = directions(count, norm), directions(count, seed=5)
    units = units / units.norm(dim=-1, keepdim=True)
    return [
        Request(model.tokenize(PROMPTS[i % len(PROMPTS)]), thetas[i], i, None if i % 3 else units[i], temperature)
        for i in range(count)
    ]


def transformers_greedy(model, request, max_new_tokens):
    def add(_layer, _args, output):
        h = (output[0] if isinstance(output, tuple) else output) + request.theta
        if request.ablated is not None:
            h = h - (h @ request.ablated)[..., None] * request.ablated
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = model.layers[SOURCE].register_forward_hook(add)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.end_tokens, pad_token_id=257
    )
    ids = model.network.generate(
        request.tokens[None], attention_mask=torch.ones(1, len(request.tokens)).long(), generation_config=settings
    )
    handle.remove()
    return ids[0, len(request.tokens) :].tolist()


@pytest.mark.filterwarnings("error:.*costs time only")
@every_family
def test_greedy_texts_are_token_for_token_those_of_transformers_with_a_hook(family):
    model = tiny(family)
    requests = requests_of(model)
    ours = generate(model, requests, SOURCE, max_new_tokens=12, slots=4)
    for request, text in zip(requests, ours, strict=True):
        theirs = transformers_greedy(model, request, 12)
        assert text.tokens == [token for token in theirs if token != END]
        assert text.finish_reason == ("stop" if END in theirs else "length")


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_greedy_texts_agree_beyond_a_sliding_window(family):
    model = tiny(family, sliding_window=8)
    requests = requests_of(model)
    ours = generate(model, requests, SOURCE, max_new_tokens=12, slots=3)
    for request, text in zip(requests, ours, strict=True):
        assert text.tokens == [token for token in transformers_greedy(model, request, 12) if token != END]


@pytest.mark.parametrize("config", [BloomConfig, GPTNeoConfig, Llama4TextConfig], ids=lambda config: config.model_type)
def test_a_model_whose_attention_is_of_another_kind_reads_everything_anew(config, recwarn):
    sizes = {"num_hidden_layers": 4, "hidden_size": D_MODEL, "num_attention_heads": 4, "vocab_size": 260}
    own = {
        BloomConfig: {"n_layer": 4, "n_head": 4},
        GPTNeoConfig: {"num_layers": 4, "num_heads": 4, "window_size": 8,
                        "attention_types": [[["global", "local"], 2]]},
        Llama4TextConfig: sizes | {"head_dim": 8, "num_key_value_heads": 2, "attention_chunk_size": 8,
                                   "num_local_experts": 2, "intermediate_size": 32, "intermediate_size_mlp": 32},
    }[config]  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config(**sizes | own, eos_token_id=END, pad_token_id=257))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    model = LanguageModel.wrap(network, byte_tokenizer())
    requests = requests_of(model, 4)
    ours = generate(model, requests, SOURCE, max_new_tokens=12, slots=3)
    assert any("keys and values are not kept, which costs time only" in str(told.message) for told in recwarn)
    for request, text in zip(requests, ours, strict=True):
        assert text.tokens == [token for token in transformers_greedy(model, request, 12) if token != END]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_sampled_text_depends_on_its_job_alone(top_p):
    model = tiny()
    requests = requests_of(model, temperature=1.0)
    options = {"max_new_tokens": 10, "top_p": top_p}
    alone = [generate(model, [request], SOURCE, **options)[0] for request in requests]
    assert generate(model, requests, SOURCE, slots=3, **options) == alone
    assert generate(model, requests[::-1], SOURCE, **options) == alone[::-1]
    other = [dataclasses.replace(request, seed=request.seed + 100) for request in requests]
    assert generate(model, other, SOURCE, **options) != alone


def test_rows_that_stop_early_make_room_for_those_that_wait():
    model = tiny("qwen2")
    # A prompt's first greedy token declared an end token stops that prompt at once, and maybe others.
    requests = requests_of(model, 12)
    free = generate(model, requests, SOURCE, max_new_tokens=6)
    model.network.generation_config.eos_token_id = ends = [free[0].tokens[0], free[1].tokens[2], END]
    try:
        stopped = generate(model, requests, SOURCE, max_new_tokens=6, slots=4)
    finally:
        model.network.generation_config.eos_token_id = END
    assert stopped[0].tokens == []
    for before, after in zip(free, stopped, strict=True):
        cut = next((i for i, token in enumerate(before.tokens) if token in ends), None)
        assert after.tokens == before.tokens[:cut]
        assert after.finish_reason == ("length" if cut is None and len(before.tokens) == 6 else "stop")


def test_the_models_context_bounds_the_text():
    model = tiny("gpt2", max_position_embeddings=20)
    tokens = model.tokenize("a prompt of 15.")
    (text,) = generate(model, [Request(tokens, directions(1)[0], temperature=0)], SOURCE, max_new_tokens=50)
    assert (len(text.tokens), text.finish_reason) == (5, "length")


def test_no_jobs_no_texts():
    assert generate(tiny(), [], SOURCE, max_new_tokens=5) == []


def test_a_vector_that_is_not_finite_is_an_error_and_leaves_no_hook():
    model = tiny()
    before = list(model.layers[SOURCE]._forward_hooks)
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(model, [Request(model.tokenize("Hi"), torch.full((32,), torch.nan))], SOURCE, max_new_tokens=3)
    assert list(model.layers[SOURCE]._forward_hooks) == before


def test_choose_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for uniform, token in [(0.0, 0), (0.09, 0), (0.11, 1), (0.35, 2), (0.61, 3), (0.999999, 3)]:
        assert choose(logits, torch.tensor([uniform]).double(), torch.ones(1), 1.0).tolist() == [token]


def test_choose_draws_with_the_right_frequencies():
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).expand(40_000, 6)
    uniforms = (torch.arange(40_000).double() + 0.5) / 40_000
    counts = choose(logits, uniforms, torch.full((40_000,), 0.7), 1.0).bincount(minlength=6) / 40_000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), rtol=0, atol=1e-4)


def test_top_p_keeps_the_tokens_that_transformers_keeps():
    logits = 2 * torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    kept = LogitsProcessorList([TopPLogitsWarper(0.7)])(None, logits).isfinite()  # ty: ignore[invalid-argument-type]
    for uniform in torch.linspace(0, 0.9999, 20).double():
        chosen = choose(logits, uniform.expand(50), torch.ones(50), 0.7)
        assert bool(kept.gather(-1, chosen[:, None]).all())
    reached = {int(choose(logits[:1], u[None], torch.ones(1), 0.7)) for u in torch.linspace(0, 0.9999, 2000).double()}
    assert reached == set(kept[0].nonzero()[:, 0].tolist())


def test_as_many_slots_as_memory_holds_and_no_more_than_suit_the_device():
    network = tiny().network
    config = network.config
    keys = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert slot_bytes(network, 128) == 128 * keys
    assert [default_slots(network, 128, device) for device in ("cpu", "cuda")] == [16, 64]
    assert default_slots(network, 128, "cuda", free=2 * 10.5 * 128 * keys) == 10
    assert default_slots(network, 128, "cuda", free=0) == 1
    # 64 slots of Qwen1.5-1.8B at 3,000 tokens would take 77 GB.
    large: Any = SimpleNamespace(config=SHAPES["qwen1.5-1.8b"], dtype=torch.float32)
    assert default_slots(large, width(3000), "cuda") * slot_bytes(large, width(3000)) < 8 << 30
    assert default_slots(large, width(3000), "cuda") == 7


def test_a_wider_batch_takes_the_place_of_the_one_before_and_a_narrower_text_uses_it():
    model = dataclasses.replace(tiny())
    for text, length in (("Hi", 128), ("a prompt of more tokens than a slot has. " * 4, 256), ("Hi", 256)):
        generate(model, [Request(model.tokenize(text), directions(1)[0])], SOURCE, max_new_tokens=3)
        assert model.kept["batch"].shape == (16, length)
