import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from melbo_ray.cli import flags
from melbo_ray.errors import UserError
from melbo_ray.model.architecture import decoder_layers
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.model.loading import pick_device
from tests.families import FAMILIES, NUM_LAYERS, byte_tokenizer, every_family, tiny

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_STYLE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return LanguageModel.wrap(tiny().network, tokenizer)


def text_of(model, *args):
    return model.tokenizer.decode(model.tokenize(*args))


@every_family
def test_the_decoder_layers_are_found_by_inspection(family):
    model = tiny(family)
    assert len(model.layers) == NUM_LAYERS
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_layers_that_cannot_be_told_apart_are_refused():
    network = LlamaForCausalLM(tiny().network.config)  # ty: ignore[invalid-argument-type]
    network.other = nn.ModuleList(nn.Identity() for _ in range(NUM_LAYERS))
    with pytest.raises(UserError, match="2 module lists have 4 entries"):
        decoder_layers(network)


def test_the_system_prompt_is_the_templates_own_none_or_ones_own():
    model = with_template(CHATML)
    turn = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(model, "Hello?") == "<|im_start|>system\nBe kind.<|im_end|>\n" + turn
    assert text_of(model, "Hello?", "none") == turn
    assert text_of(model, "Hello?", "Be brief.") == "<|im_start|>system\nBe brief.<|im_end|>\n" + turn
    assert text_of(model, "Hello?", "none", "Yes,") == turn + "Yes,"


def test_without_a_system_prompt_the_start_token_stays():
    model = with_template(LLAMA_STYLE)
    assert text_of(model, "Hello?", "none") == text_of(model, "Hello?") == "<start>[user]Hello?[answer]"


def test_a_model_without_a_template_gets_the_prompt_bare():
    assert text_of(tiny(), "Hello?") == "Hello?"


@pytest.mark.parametrize(("prompt", "said"), [("", "empty"), ("  \n", "empty"), ("x" * 256, "context is 256")])
def test_prompts_that_will_not_do_are_refused(prompt, said):
    with pytest.raises(UserError, match=said):
        tiny().tokenize(prompt)


def test_the_fingerprint_tells_models_apart_and_survives_saving(tmp_path):
    model = tiny()
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = LanguageModel.load(str(tmp_path))
    assert again.fingerprint() == model.fingerprint()
    with torch.no_grad():
        next(again.network.parameters())[0] += 1
    assert again.fingerprint() != model.fingerprint()
    assert len({tiny(family).fingerprint() for family in FAMILIES}) == len(FAMILIES)


def test_a_model_that_is_not_there_is_refused_in_a_line(tmp_path):
    for name in [str(tmp_path), str(tmp_path / "model.gguf")]:
        with pytest.raises(UserError, match=r"cannot load|no GGUF") as refusal:
            LanguageModel.load(name)
        assert "\n" not in str(refusal.value)


def test_without_network_a_model_of_the_hub_is_soon_refused_in_a_line(monkeypatch, capfd):
    waits = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(
        UserError, match="cannot load the model 'no-such-org/no-such-model': We couldn't connect"
    ) as said:
        LanguageModel.load("no-such-org/no-such-model")
    assert "\n" not in str(said.value)
    assert (waits, capfd.readouterr().err) == ([1, 2], "")


def test_weights_kept_as_a_pickle_are_refused(tmp_path):
    config = LlamaConfig(**tiny().network.config.to_dict())
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(tiny().network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        LanguageModel.load(str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "mps", "cdua", "xpu:0"])
def test_a_device_that_is_none_of_ours_is_refused_in_a_line(device):
    with pytest.raises(UserError, match=f"no device {device!r}: expected auto, cpu or cuda"):
        pick_device(device)


@pytest.mark.skipif("torch.cuda.is_available()", reason="this machine has CUDA")
def test_cuda_asked_for_and_absent_is_said():
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(UserError) as said:
        pick_device("cuda")
    assert "--device cpu or auto" in flags(str(said.value))


def test_the_embedded_model_is_a_chat_model_that_answers():
    model = LanguageModel.load("smollm2", device="cpu")
    tokens = model.tokenize("What is the capital of France?")
    assert (model.d_model, len(model.layers), model.name) == (576, 30, "smollm2")
    with torch.no_grad():
        answer = model.network.generate(tokens[None], max_new_tokens=12, do_sample=False)[0, len(tokens) :]  # ty: ignore[not-callable]
    assert "Paris" in model.tokenizer.decode(answer)
