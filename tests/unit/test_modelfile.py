"""The chat template for ollama: worked out from Jinja's, and left out where that does more."""

import json
import re

import pytest

from tests.tiny import BYTE_LEVEL_TEMPLATE, CHAT_TEMPLATE
from toolchain.bundle import modelfile
from toolchain.bundle.modelfile import Chat

QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') }}"
    "{{ '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LAST_ONLY = "{{ 'Q: ' + messages[-1]['content'] + '\\nA:' }}"
CHATS: tuple[Chat, ...] = (
    [{"role": "user", "content": 'a {{ b }} "c"'}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
)


def go(template: str, chat: Chat) -> str:
    """The part of Go's template language that is used."""
    system = next((turn["content"] for turn in chat if turn["role"] == "system"), "")
    tokens = re.findall(r"\{\{ (.*?) \}\}(?=\{\{|$)", template)
    assert "".join(f"{{{{ {token} }}}}" for token in tokens) == template

    def run(at: int, turn: dict[str, str] | None, write: bool) -> tuple[str, int]:
        text = ""
        while at < len(tokens):
            token = tokens[at]
            if token == "end":
                return text, at
            if token == "range .Messages":
                for item in chat:
                    part, end = run(at + 1, item, write)
                    text += part
                at = end
            elif token.startswith("if "):
                role = re.fullmatch(r'if eq \.Role "(\w+)"', token)
                true = turn is not None and turn["role"] == role[1] if role else not system
                part, at = run(at + 1, turn, write and true)
                text += part if true else ""
            elif token == ".Content":
                assert turn is not None
                text += turn["content"]
            else:
                text += json.loads(token)
            at += 1
        return text, at

    return run(0, None, True)[0]


def jinja(template: str, chat: Chat) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=chat, add_generation_prompt=True, bos_token="<s>")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN, GEMMA], ids=["ChatML", "Qwen", "Gemma"])
def test_the_template_writes_what_jinja_writes(template: str) -> None:
    turns = modelfile.read_turns(template, bos="<s>", eos=None)
    assert turns is not None
    assert (turns.system is None) == (template == GEMMA)
    for chat in CHATS if turns.system else CHATS[:2]:
        assert go(modelfile.go_template(turns), chat) == jinja(template, chat)


@pytest.mark.parametrize("template", [LAST_ONLY, BYTE_LEVEL_TEMPLATE, "{% if", "{{ messages[0].content }}"])
def test_a_template_that_does_more_is_left_out(template: str) -> None:
    text = modelfile.render(
        model="model/x.gguf", template=template, bos=None, eos="</s>", stops=["</s>"], context=512, system=None
    )
    assert modelfile.read_turns(template, bos=None, eos=None) is None or "TEMPLATE" in text
    assert text.startswith("FROM ./model/x.gguf\n")
    assert text.endswith('PARAMETER num_ctx 512\nPARAMETER stop "</s>"\n')


def test_the_system_message_of_the_training_is_in_it() -> None:
    text = modelfile.render(
        model="m.gguf", template=CHAT_TEMPLATE, bos=None, eos=None, stops=[], context=512, system='Say "no".\nAlways.'
    )
    assert 'SYSTEM "Say \\"no\\".\\nAlways."' in text
