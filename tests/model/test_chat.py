"""A prompt in chat templates of every habit: written here, and checked against what a person would cut out of them."""

import re

import pytest

from melbo_ray.cli import flags
from melbo_ray.errors import UserError
from melbo_ray.model.language_model import LanguageModel
from tests.families import byte_tokenizer, tiny

CHATML = (
    "{%- if not messages or messages[0].role != 'system' %}SYSTEM{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if loop.last and m.role == 'assistant' %}THINK{% endif %}{{ m.content }}END"
    "{%- if loop.last and not add_generation_prompt %}LAST{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = "<|im_start|>system\nBe kind.<|im_end|>\n"
TURN = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"


def chatml(system="", think="", end="<|im_end|>\n", last="", start=""):
    """ChatML with habits: a system turn of its own, a thinking block in the last answer, a token after the end."""
    parts = {"SYSTEM": system, "THINK": think, "LAST": last, "END": end}
    text = CHATML
    for name, part in parts.items():
        text = text.replace(name, "{{ " + repr(part) + " }}")
    return ("{{ bos_token }}" if start else "") + text


def with_template(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return LanguageModel.wrap(tiny().network, tokenizer, name="ours")


def text_of(template, system_prompt="none", prompt="Hello?"):
    model = with_template(template)
    return model.tokenizer.decode(model.tokenize(prompt, system_prompt))


HABITS = {
    "plain": {},
    "own system turn": {"system": OWN},
    "thinking block": {"think": "<think>\n\n</think>\n\n"},
    "thinking block, own system turn": {"think": "<think>\n\n</think>\n\n", "system": OWN},
    "end token": {"last": "<end>"},
    "end token, own system turn": {"last": "<end>", "system": OWN},
    "the end token ends every turn, own system turn": {"end": "<end>", "system": "<|im_start|>system\nBe kind.<end>"},
}


@pytest.mark.parametrize("habits", HABITS.values(), ids=HABITS)
@pytest.mark.parametrize("start", ["", "<start>"])
def test_without_a_system_turn_the_users_turn_is_all_there_is(habits, start):
    template = chatml(**habits, start=start)
    end = habits.get("end", "<|im_end|>\n")
    turn = TURN.replace("<|im_end|>\n", end)
    assert text_of(template) == start + turn
    assert text_of(template, "default") == start + habits.get("system", "") + turn
    given = f"<|im_start|>system\nBe brief.{end}"
    assert text_of(template, "Be brief.") == start + given + turn


@pytest.mark.parametrize("prompt", ["  Hello?\n", "melbo-answer", "melbo-probe melbo-answer<|im_end|>\n"])
def test_a_prompt_of_any_text_is_all_that_is_left(prompt):
    assert text_of(chatml(system=OWN), prompt=prompt) == TURN.replace("Hello?", prompt)


def test_a_system_text_inside_the_users_first_turn_is_left_out():
    """As Llama 2 has it."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first %}<<SYS>>\nBe kind.\n<</SYS>>\n\n{% endif %}{{ m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    assert text_of(template, "default") == "<start>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello? [/INST]"
    assert text_of(template) == "<start>[INST] Hello? [/INST]"


@pytest.mark.parametrize("habits", [{"last": "<|unlike|>"}, {"end": ""}])
def test_where_the_end_of_a_turn_cannot_be_told_a_template_with_a_system_turn_is_refused(habits):
    with pytest.raises(UserError) as said:
        text_of(chatml(system="<|im_start|>system\nBe kind.", **habits))
    assert re.search(r"a system turn of its own.*--system-prompt default", flags(str(said.value)))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML,
            "No system",
        ),
        ("{% for m in messages if m.role == 'user' %}[{{ m.content }}]{% endfor %}", "leaves system turns out"),
        (None, "has no chat template"),
    ],
)
def test_a_system_turn_that_the_model_has_no_place_for_is_refused_in_a_line(template, said):
    with pytest.raises(UserError, match=said) as refusal:
        text_of(template, "Be brief.")
    assert "\n" not in str(refusal.value)
    assert "'ours'" in str(refusal.value)


def test_a_template_that_takes_one_turn_only_is_refused_without_a_system_turn_in_a_line():
    single = "{% if messages | length > 1 %}{{ raise_exception('one\nturn') }}{% endif %}[{{ messages[0].content }}]"
    assert text_of(single, "default") == "[Hello?]"
    with pytest.raises(UserError) as said:
        text_of(single)
    assert "refuses turns of user, assistant, user (one): use --system-prompt default" in flags(str(said.value))


@pytest.mark.parametrize("system_prompt", ["default", "none"])
def test_without_a_template_the_prompt_is_bare(system_prompt):
    assert text_of(None, system_prompt) == "Hello?"
