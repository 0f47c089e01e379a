"""Less than the whole of a model: the same figures from less."""

import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from melbo_ray.cluster.memory import demands
from melbo_ray.cluster.worker import Worker
from melbo_ray.concepts.loader import load_concept
from melbo_ray.config import Config
from melbo_ray.errors import UserError
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.partial import lower, lower_fingerprint, reads_whole, sketch
from melbo_ray.model.residual_slice import Slice
from tests import architectures
from tests.families import D_MODEL, directions, every_family, tiny

SOURCE, TARGET = 0, 1


@pytest.fixture
def saved(tmp_path):
    """(family) → a configuration whose model is that family's, on disk."""

    def save(family):
        model = tiny(family)
        model.network.save_pretrained(tmp_path)
        model.tokenizer.save_pretrained(tmp_path)
        return Config(model=str(tmp_path), source_layer=SOURCE, target_layer=TARGET, device="cpu")

    return save


@every_family
def test_a_chain_sees_the_same_slice_in_the_lower_part_as_in_the_whole(saved, family):
    config = saved(family)
    whole, part = LanguageModel.load(config.model, device="cpu"), lower(config)
    assert len(part.layers) == TARGET + 1 < len(whole.layers)
    thetas = directions(3, norm=2.0, seed=1)
    z = [Slice(model, [model.tokenize("How are you?")], SOURCE, TARGET).z(thetas) for model in (whole, part)]
    assert torch.equal(*z)


@every_family
def test_the_lower_part_has_the_fingerprint_that_the_whole_model_has_of_it(saved, family):
    config = saved(family)
    whole, part = LanguageModel.load(config.model, device="cpu"), lower(config)
    assert whole.fingerprint() != part.fingerprint() == lower_fingerprint(part, TARGET + 1)
    assert lower_fingerprint(whole, TARGET + 1) == part.fingerprint()
    for layer, same in ((TARGET + 1, True), (TARGET, False)):
        next(whole.layers[layer].parameters())[0] += 1
        assert (lower_fingerprint(whole, TARGET + 1) == part.fingerprint()) is same


@every_family
def test_a_sketch_has_the_sizes_and_the_tokens_but_no_weights(saved, family):
    config = saved(family)
    whole, shape = LanguageModel.load(config.model, device="cpu"), sketch(config)
    assert (shape.d_model, len(shape.layers)) == (D_MODEL, len(whole.layers))
    assert torch.equal(shape.tokenize("How are you?"), whole.tokenize("How are you?"))
    parameters = [{name: p.shape for name, p in model.network.named_parameters()} for model in (shape, whole)]
    assert parameters[0] == parameters[1]
    assert {p.device.type for p in shape.network.parameters()} == {"meta"}


def test_layers_that_are_named_are_those_of_every_model_that_is_loaded(tmp_path):
    """LongCat's number of layers is twice that of its list."""
    model = architectures.tiny("longcat_flash")
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    config = Config(model=str(tmp_path), layers="model.layers", source_layer=SOURCE, target_layer=TARGET, device="cpu")
    part = lower(config)
    assert (len(part.layers), len(sketch(config).layers)) == (TARGET + 1, 4)
    assert not reads_whole(config)
    worker = Worker(f"memory://{tmp_path.name}", "run", config, [], threads=1)
    assert len(worker._load().layers) == 4
    for load in (sketch, lower):
        with pytest.raises(UserError, match=r"`layers` is 'model\.layrs'"):
            load(config.model_copy(update={"layers": "model.layrs"}))


@pytest.mark.parametrize("family", ["gemma4", "gemma4-shared"])
def test_where_the_lower_layers_are_others_in_a_shorter_model_chains_read_the_whole(saved, family):
    config = saved(family)
    whole = LanguageModel.load(config.model, device="cpu")
    with pytest.warns(UserWarning, match="chains read the whole model, since its layers are others in a shorter one"):
        part = lower(config)
    assert len(part.layers) == len(whole.layers)
    asked = demands(sketch(config), config, [load_concept("code")], whole=reads_whole(config))
    assert asked.chain.weights == asked.evaluator.weights
    assert lower_fingerprint(part, TARGET + 1) == lower_fingerprint(whole, TARGET + 1)


def test_a_scale_that_goes_by_the_number_of_layers_is_seen(saved, monkeypatch):
    config = saved("llama")
    real = LlamaDecoderLayer.__init__

    def scaled(self, config, layer_idx):
        real(self, config, layer_idx)
        # As MiniCPM3 does: no weight shows it.
        self.residual_scale = config.num_hidden_layers**-0.5

    assert len(lower(config).layers) == TARGET + 1
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", scaled)
    with pytest.warns(UserWarning, match="chains read the whole model"):
        assert len(lower(config).layers) == len(tiny("llama").layers)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OursConfig(LlamaConfig):
    model_type = "ours"

class OursForCausalLM(LlamaForCausalLM):
    config_class = OursConfig
"""


def test_a_model_with_code_of_its_own_is_sketched_where_that_is_trusted(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    config = saved("llama")
    shape = json.loads((tmp_path / "config.json").read_text())
    shape |= {"model_type": "ours", "architectures": ["OursForCausalLM"]}
    shape["auto_map"] = {"AutoConfig": "ours.OursConfig", "AutoModelForCausalLM": "ours.OursForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    (tmp_path / "ours.py").write_text(CODE)
    with pytest.raises(UserError, match="cannot load the model") as said:
        sketch(config)
    assert "\n" not in str(said.value)
    trusting = config.model_copy(update={"trust_remote_code": True})
    assert type(sketch(trusting).network).__name__ == type(lower(trusting).network).__name__ == "OursForCausalLM"
