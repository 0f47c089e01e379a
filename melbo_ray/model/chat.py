"""Rendering a prompt in a model's chat template, with the default, no, or a given system turn."""

import itertools
from typing import Any

from jinja2 import TemplateError

from melbo_ray.errors import UserError, first_line

_PROBE, _ANSWER = "melbo-probe", "melbo-answer"

Turns = list[dict[str, str]]


def chat(tokenizer: Any, name: str, prompt: str, system_prompt: str) -> str:
    """The chat text of a user `prompt`, up to the beginning of the model's turn.

    `system_prompt` is `default` (the template's own), `none` (no system turn, even if the template would add one), or
    the text of the system turn. Without a chat template the text is the bare prompt.

    Raises:
        UserError: the template is missing or drops the system turn, or its own system turn cannot be removed.
    """
    own = system_prompt in ("default", "none")
    if tokenizer.chat_template is None:
        if not own:
            raise UserError(
                f"the model {name!r} has no chat template, so `system_prompt` has no place: put it into the prompt"
            )
        return prompt
    template = _Template(tokenizer, name)
    if own:
        return template.without_system(prompt) if system_prompt == "none" else template.render([_turn("user", prompt)])
    text = template.render([_turn("system", system_prompt), _turn("user", prompt)])
    if system_prompt.strip() not in text:
        raise UserError(f"the chat template of {name!r} leaves system turns out: use `system_prompt` none or default")
    return text


class _Template:
    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.start, self.end = tokenizer.bos_token or "", tokenizer.eos_token or ""

    def render(self, turns: Turns, answer_next: bool = True) -> str:
        """The text of the turns, followed by the opening of the model's turn if `answer_next`."""
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            hint = ": use `system_prompt` default" if len(turns) > 1 else ""
            raise UserError(
                f"the chat template of {self.name!r} refuses turns of {roles} ({first_line(error)}){hint}"
            ) from None

    def without_system(self, prompt: str) -> str:
        """The text of the user's turn without any system turn.

        A template adds its own system turn before the first turn only. The texts before a first and before a later user
        turn share their end, the opening of a user turn. If only the start token precedes that opening, there is no
        system turn; otherwise the later turn is taken, from the end of the turn before it.
        """
        alone, exchange = (
            self.render([_turn("user", prompt)]),
            [_turn("user", "melbo-question"), _turn("assistant", _ANSWER)],
        )
        first, later = (
            self.render([*before, _turn("user", _PROBE)]).rpartition(_PROBE)[0] for before in ([], exchange)
        )
        if first.removesuffix(_common_end(first, later)) in ("", self.start):
            return alone
        closing = self._closing(exchange, later.rpartition(_ANSWER)[2])
        cut = later.rfind(_ANSWER) + len(_ANSWER) + len(closing)
        text = self.render([*exchange, _turn("user", prompt)])
        if not closing or text[:cut] != later[:cut]:
            raise UserError(
                f"the chat template of {self.name!r} adds a system turn of its own, and where it ends cannot be told: "
                "use `system_prompt` default, or give a text"
            )
        # SmolLM2's start token is ChatML's opening of every turn, so the start token is added only if it is missing.
        text = text[cut:]
        return self.start + text if alone.startswith(self.start) and not text.startswith(self.start) else text

    def _closing(self, exchange: Turns, after: str) -> str:
        """The closing of an assistant turn: that of the last turn, without an end token that only the last turn has.

        The result is empty if the text `after` an earlier assistant turn does not begin with it.
        """
        last = self.render(exchange, answer_next=False).rpartition(_ANSWER)[2]
        return next((end for end in (last, last.removesuffix(self.end)) if end and after.startswith(end)), "")


def _common_end(one: str, other: str) -> str:
    pairs = zip(reversed(one), reversed(other), strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - length :]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
