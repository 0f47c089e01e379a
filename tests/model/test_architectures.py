"""What is computed of a model is what transformers computes of it, on a spread of families."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BertConfig

from melbo_ray.errors import UserError
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.residual_slice import Slice
from melbo_ray.model.sampling import Request, generate
from melbo_ray.model.steering import Prompts
from tests.architectures import CHECKS, LAYERS, SOURCE, TARGET, families, judge, tiny
from tests.families import byte_tokenizer, directions
from tests.shrinking import sizes

SPREAD = [
    "bloom", "falcon", "gpt_neo", "xlstm", "mpt", "opt", "cohere2", "gemma4_text", "gpt_oss", "mixtral", "deepseek_v3",
    "minicpm3", "minimax", "lfm2", "qwen3_next", "jamba", "mamba2", "recurrent_gemma", "zamba2", "gemma3n_text",
]  # fmt: skip


@pytest.mark.parametrize("family", [*SPREAD, *LAYERS])
def test_nothing_is_wrong(family):
    cells = judge(family)
    assert list(cells) == list(CHECKS)
    assert {cell["verdict"] for cell in cells.values()} <= {"exact", "plain way", "refused"}, cells
    assert not any("\n" in line for cell in cells.values() for line in cell.get("why", []))


def test_the_spread_is_of_families_that_there_are():
    assert set(SPREAD) <= set(families())
    assert len(SPREAD) == 20 == len(set(SPREAD))


@pytest.mark.parametrize("family", ["openai-gpt", "qwen4_exp_text", "reformer", "xlnet"])
def test_layers_between_which_something_else_runs_than_one_stream_are_refused_in_a_line(family):
    for cell in judge(family).values():
        assert cell["verdict"] == "refused"
        assert "between its layers runs " in cell["why"][0]


@pytest.mark.parametrize("decoder", [True, False])
def test_a_model_that_reads_both_ways_is_refused_in_a_line(decoder):
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = BertConfig(**sizes, vocab_size=260, initializer_range=0.3, is_decoder=decoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(config)
    tokens, thetas = torch.arange(40, 60), directions(1)
    uses = [
        lambda model: Slice(model, [tokens], 0, 1),
        lambda model: Prompts(model, [tokens], 0),
        lambda model: generate(model, [Request(tokens, thetas[0])], 0, max_new_tokens=2),
    ]
    for use in uses:
        model = LanguageModel.wrap(network, byte_tokenizer())
        if decoder:
            use(model)
        else:
            with pytest.raises(UserError, match="the model is not causal"):
                use(model)


@pytest.mark.parametrize("family", LAYERS)
def test_where_the_layers_are_not_found_the_refusal_says_how_to_name_them(family):
    network = tiny(family).network
    with pytest.raises(UserError, match=rf"0 module lists have \d+ entries.*`layers`.* {LAYERS[family]} \(4\)") as said:
        LanguageModel.wrap(network, byte_tokenizer())
    assert "\n" not in str(said.value)


def test_a_path_that_leads_to_no_module_list_is_refused_in_a_line():
    for path in ("model.layrs", "model", "model.layers.0.mlp"):
        with pytest.raises(UserError, match=f"`layers` is '{path}'.* of LlamaForCausalLM: .*model.layers") as said:
            LanguageModel.wrap(tiny("llama").network, byte_tokenizer(), layers=path)
        assert "\n" not in str(said.value)


def test_a_list_of_parts_of_layers_is_not_taken_for_layers():
    """XLM has no module that is a layer; its last norms put out the stream, and do not take it."""
    with pytest.raises(UserError, match="4 module lists have 4 entries"):
        tiny("xlm")
    config = CONFIG_MAPPING["xlm"](**sizes("xlm", CONFIG_MAPPING["xlm"]), causal=True)  # ty: ignore[unknown-argument]
    network = AutoModelForCausalLM.from_config(config)
    model = LanguageModel.wrap(network, byte_tokenizer(), layers="transformer.layer_norm2")
    with pytest.raises(UserError, match="what its layer 2 takes is not what the one below it puts out"):
        Slice(model, [torch.arange(40, 60)], SOURCE, TARGET)


def test_a_context_without_a_limit_is_none():
    model = tiny("llama")
    stated, limited = model.network.config.max_position_embeddings, model.max_length
    model.network.config.max_position_embeddings = -1
    assert limited == stated > 0
    assert model.max_length > 1 << 20
