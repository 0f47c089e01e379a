"""A run's vectors on any prompt: texts and next tokens are those of plain hooks; the command prints them."""

import pytest
import torch

from melbo_ray import UserError
from melbo_ray.__main__ import main
from melbo_ray.model.language_model import LanguageModel
from melbo_ray.play.stage import NAMES, NextTokens, Stage, Text
from tests.families import plain_logits, tiny
from tests.stages import LAYER, stage, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs"))


def plain_text(model, prompt, theta, length):
    tokens, written = model.tokenize(prompt), []
    while len(written) < length:
        token = plain_logits(model, tokens, LAYER, theta)[-1].argmax()
        if int(token) in model.end_tokens:
            break
        written.append(int(token))
        tokens = torch.cat([tokens, token[None]])
    return model.tokenizer.decode(written, skip_special_tokens=True)


def test_every_direction_writes_what_a_plain_hook_makes_the_model_write(run):
    acting = stage(run)
    directions = acting.directions("code", 3, 5.0)
    events = list(acting.write("How?", directions, 5))
    ends = {event.name: event for event in events if isinstance(event, Text) and event.finish_reason}
    base = plain_logits(acting.model, acting.model.tokenize("How?"), LAYER, directions["base"])[-1].log_softmax(-1)
    for name, theta in directions.items():
        assert ends[name].text == plain_text(acting.model, "How?", theta, 5)
        (first,) = [event for event in events if isinstance(event, NextTokens) and event.name == name]
        log = plain_logits(acting.model, acting.model.tokenize("How?"), LAYER, theta)[-1].log_softmax(-1)
        best = log.exp().topk(10)
        assert [p for _, p in first.tokens] == pytest.approx(best.values.tolist(), rel=1e-3)
        assert first.tokens[0][0] == acting.model.tokenizer.decode([int(best.indices[0])])
        assert first.kl_from_base == pytest.approx(float((log.exp() * (log - base)).sum()), abs=1e-4)


def test_directions_have_the_norm_asked_for_and_the_random_one_avoids_the_chain_before(run):
    acting = stage(run)
    thetas = torch.tensor(acting.vectors["code"].theta)
    found = acting.directions("code", 3)
    assert tuple(found) == NAMES
    torch.testing.assert_close(found["vector"], thetas[3])
    torch.testing.assert_close(found["base"], thetas[0])
    assert float(found["random"].norm()) == pytest.approx(6.0)
    assert float((thetas[:3] @ found["random"]).abs().max()) < 1e-4
    assert float(found["unsteered"].norm()) == 0
    at = acting.directions("code", 3, 1.5)
    assert [float(at[name].norm()) for name in NAMES] == pytest.approx([1.5, 3.0, 1.5, 0.0])
    torch.testing.assert_close(at["vector"], thetas[3] / 4)
    torch.testing.assert_close(at["random"] * 4, found["random"])


def test_what_cannot_be_written_is_one_error(run):
    acting = stage(run)
    with pytest.raises(UserError, match="no vector 9"):
        acting.directions("code", 9)
    with pytest.raises(UserError, match="no vectors of concept 'stem'"):
        acting.directions("stem", 1)
    with pytest.raises(UserError, match="prompt is empty"):
        list(acting.write(" ", acting.directions("code", 1), 3))
    endless = {"base": torch.full((32,), float("inf"))}
    with pytest.raises(UserError, match="take a smaller norm"):
        list(acting.write("How?", endless, 3))


def command(monkeypatch, capsys, *args, model=None):
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: model or tiny())
    monkeypatch.setenv("COLUMNS", "200")
    code = main(["steer", *args])
    return code, capsys.readouterr()


def test_the_command_prints_three_texts_side_by_side(run, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "--run", str(run), "--index", "2", "--max-new-tokens", "4", "Why?")
    assert code == 0
    assert all(title in said.out for title in ("base, norm 3", "code 2, norm 5", "unsteered"))
    assert said.out.index("base") < said.out.index("code 2") < said.out.index("unsteered")


def test_what_a_model_writes_does_not_reach_the_terminal_as_commands(run, monkeypatch, capsys):
    hostile = [Text(name, "\x1b[31m[red]\x07 \u202e", "stop") for name in NAMES]
    monkeypatch.setattr(Stage, "write", lambda *_: iter(hostile))
    code, said = command(monkeypatch, capsys, "--run", str(run), "Why?")
    assert code == 0
    assert "�[31m[red]� �" in said.out
    assert "\x1b" not in said.out
    assert "\u202e" not in said.out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--index", "9"], "no vector 9: expected 0 (the base) to 4"),
        (["--concept", "stem"], "no vectors of concept 'stem'"),
        (["--max-new-tokens", "0"], "expected at least 1"),
        (["--norm", "nan"], "take a smaller norm"),
    ],
)
def test_bad_input_is_one_line(run, monkeypatch, capsys, args, said):
    code, told = command(monkeypatch, capsys, "--run", str(run), *args, "Why?")
    assert (code, told.err.count("\n")) == (2, 1)
    assert said in told.err


def test_another_model_is_one_line(run, monkeypatch, capsys):
    narrow = tiny(num_hidden_layers=1)
    code, said = command(monkeypatch, capsys, "--run", str(run), "Why?", model=narrow)
    assert (code, said.err.count("\n")) == (2, 1)
    assert "act at layer 1; 'tiny-llama' has d_model 32 and 1 layers" in said.err
