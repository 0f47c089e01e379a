import pytest

from melbo_ray.concepts.loader import load_concept
from melbo_ray.errors import UserError

_WHOLE = 'name = "a"\nprompt = "p"\ncontinuations = ["c"]\nwords = ["w"]\n'
SHIPPED = ["code", "alien", "stem", "jailbreak"]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_concept_is_whole(name):
    concept = load_concept(name)
    assert concept.name == name
    assert len(concept.held_out) >= 32
    assert concept.prompt not in concept.held_out.values()
    assert len(set(concept.held_out.values())) == len(concept.held_out)
    assert len(set(concept.neutral)) == len(concept.neutral) >= 12
    assert not {*concept.neutral} & {concept.prompt, *concept.held_out.values(), *concept.contrast}
    assert min(map(len, (concept.continuations, concept.contrast, concept.texts, concept.neutral_texts))) >= 4


def test_a_concept_of_ones_own_needs_five_lines(tmp_path):
    file = tmp_path / "pirate.toml"
    file.write_text('name = "pirate"\nprompt = "Hello?"\ncontinuations = ["Arr"]\nwords = ["arr"]\n')
    concept = load_concept(str(file))
    assert (concept.name, concept.continuations) == ("pirate", ["Arr"])
    assert concept.held_out == load_concept("code").held_out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "a"\n', "prompt"),
        ('name = "Not A Name"\nprompt = "p"\ncontinuations = ["c"]\nwords = ["w"]\n', "name"),
        ('name = "a"\nprompt = ""\ncontinuations = ["c"]\nwords = ["w"]\n', "prompt"),
        ('name = "a"\nprompt = "p"\ncontinuations = []\nwords = ["w"]\n', "continuations"),
        ('name = "a"\nprompt = "p"\ncontinuations = ["c"]\nwords = ["w"]\npromt = 1\n', "promt"),
        (_WHOLE + 'neutral = ["Hi?"]\n[held_out]\nx = "Hi?"\n', r"neutral: .*'Hi\?' is a held-out prompt"),
        (_WHOLE + '[held_out]\nx = "What do penguins eat?"\n', "neutral: .*penguins"),
        ("name: a", "cannot read"),
    ],
)
def test_a_concept_that_will_not_do_is_refused_in_a_line(tmp_path, text, said):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=said) as refusal:
        load_concept(str(tmp_path / "c.toml"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["shared", "cod", "../code", "/nowhere/c.toml"])
def test_an_unknown_concept_names_those_there_are(name):
    with pytest.raises(UserError, match=r"code, jailbreak|cannot read"):
        load_concept(name)
