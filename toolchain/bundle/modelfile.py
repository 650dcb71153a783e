"""A Modelfile for ollama, with the chat template of the GGUF in Go's template language.

ollama guesses a template from the Jinja one where it knows that by heart, and sends bare text where it does not. So the
template is worked out here: rendered chats show what stands before and after each turn, and what comes out is compared
with Jinja's own rendering of longer chats. Where that differs, the template is left out and the file says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

Chat = list[dict[str, str]]
_SYSTEM, _USER, _ASSISTANT = "\u0001system\u0001", "\u0001user\u0001", "\u0001assistant\u0001"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around each turn."""

    start: str
    """Before the first turn, where there is no system message."""
    system: tuple[str, str] | None
    """Around a system message, from the start of the text on; None where the template takes none."""
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, chat: Chat) -> str:
        """`chat` with the assistant's next turn opened."""
        text = self.start
        for turn in chat:
            around = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn["role"]]
            assert around is not None
            before, after = around
            text = before if turn["role"] == "system" else text + before
            text += turn["content"] + after
        return text + self.assistant[0]


def render(
    *,
    model: str,
    template: str,
    bos: str | None,
    eos: str | None,
    stops: Sequence[str],
    context: int,
    system: str | None,
) -> str:
    """The Modelfile; `model` is the GGUF's path from it, `stops` are the tokens that end an answer."""
    turns = read_turns(template, bos=bos, eos=eos)
    lines = [f"FROM ./{model}"]
    if turns is None:
        lines.append("# The GGUF's chat template is beyond Go's template language as far as this tool can tell: ollama")
        lines.append("# takes one of its own where it knows the model's. Compare its answers with edgectl's.")
    else:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    if system:
        lines.append(f"SYSTEM {json.dumps(system, ensure_ascii=False)}")
    lines.append(f"PARAMETER num_ctx {context}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str:
    """ollama's own loop over messages."""
    system = (
        '{{ if eq .Role "system" }}' + _go(turns.system[0]) + "{{ .Content }}" + _go(turns.system[1]) + "{{ end }}"
        if turns.system
        else ""
    )
    # A system message, where there is one, stands first and has the start in it.
    start = "{{ if not .System }}" + _go(turns.start) + "{{ end }}" if turns.start else ""
    return (
        start
        + "{{ range .Messages }}"
        + system
        + '{{ if eq .Role "user" }}' + _go(turns.user[0]) + "{{ .Content }}" + _go(turns.user[1]) + "{{ end }}"
        + '{{ if eq .Role "assistant" }}'
        + _go(turns.assistant[0]) + "{{ .Content }}" + _go(turns.assistant[1])
        + "{{ end }}{{ end }}"
        + _go(turns.assistant[0])
    )  # fmt: skip


def _go(text: str) -> str:
    """A literal as a Go string, which keeps white space and braces as they are."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def read_turns(template: str, *, bos: str | None, eos: str | None) -> Turns | None:
    """What `template` writes around each turn; None where it does more than that."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _raise

    def rendered(chat: Chat, *, answer: bool = True) -> str:
        given: dict[str, Any] = {"bos_token": bos or "", "eos_token": eos or ""}
        return environment.from_string(template).render(messages=chat, add_generation_prompt=answer, **given)

    user, assistant, system = (
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "system", "content": _SYSTEM},
    )
    try:
        turns = _turns(
            rendered([user]),
            rendered([user], answer=False),
            rendered([user, assistant, user], answer=False),
            _or_none(rendered, [system, user]),
        )
        if turns is None:
            return None
        asked = [
            [turn | {"content": f"{turn['role']} {at}: x < y & {{z}}"} for at, turn in enumerate(chat)]
            for chat in ([user], [user, assistant, user], [user, assistant, user, assistant, user])
        ]
        if turns.system is not None:
            asked += [[system | {"content": "Be brief."}, *chat] for chat in asked]
        same = all(turns.render(chat) == rendered(chat) for chat in asked)
    except TemplateError:
        return None
    return turns if same else None


def _raise(*message: object) -> None:
    raise TemplateError(str(message))


def _or_none(rendered: Any, chat: Chat) -> str | None:
    """None where the template refuses the system message, or writes it nowhere."""
    try:
        text: str = rendered(chat)
    except TemplateError:
        return None
    return text if text.count(_SYSTEM) == 1 else None


def _turns(asked: str, told: str, longer: str, with_system: str | None) -> Turns | None:
    """`asked`: a user's turn and the opening; `told`: without the opening; `longer`: user, assistant, user."""
    if not asked.startswith(told) or asked.count(_USER) != 1 or longer.count(_USER) != 2:
        return None
    opening = asked[len(told) :]
    before, after = told.split(_USER)
    first, rest = longer.split(_ASSISTANT)
    second = rest.split(_USER)[0]
    if first != before + _USER + after + opening:
        return None
    # The second user's turn has no start before it: what both openings share at their end is the turn's own.
    shared = 0
    while shared < min(len(before), len(second)) and before[-1 - shared] == second[-1 - shared]:
        shared += 1
    user_before = before[len(before) - shared :]
    start, assistant_after = before[: len(before) - shared], second[: len(second) - shared]
    system = None
    if with_system is not None:
        head, _, tail = with_system.partition(_SYSTEM)
        end = tail.find(user_before + _USER)
        if end < 0:
            return None
        system = (head, tail[:end])
    return Turns(start, system, (user_before, after), (opening, assistant_after))
