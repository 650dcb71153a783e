"""What is changed in the pinned llama.cpp, seen in its source and in what its programs do."""

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("torch")

from tests.device import tiny_chat
from tests.stages.gguf_files import serving, to_gguf
from tests.tiny import make_tiny_checkpoint
from toolchain.device.client import Client
from toolchain.gguf import convert, llama_cpp
from toolchain.gguf.llama_cpp import LlamaCpp

pytestmark = [pytest.mark.stages, pytest.mark.llama_cpp]

PLAIN_WORD_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"works": {"type": "boolean"}},
    "required": ["works"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = llama_cpp._unpack(llama_cpp.fetch(), tmp_path_factory.mktemp("patched") / "sdist")
    return top / "vendor" / "llama.cpp"


def test_the_patches_leave_nothing_beside_what_they_change(source: Path) -> None:
    changed = {line.split("/", 1)[1] for path in llama_cpp.patches() for line in _added_to(path)}
    assert len(changed) >= 3
    assert all((source / name).is_file() for name in changed)
    assert not [path for path in source.rglob("*") if path.suffix in (".orig", ".rej")]


def _added_to(path: Path) -> list[str]:
    return re.findall(r"^\+\+\+ (b/\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_text_that_tokens_are_compared_with_begins_as_the_patch_says(source: Path) -> None:
    text = (source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    head = 'if (strchr("<[_\\xe2", t.first[0]) == nullptr) {'
    assert text.count(head) == 3
    compared = 0
    for part in text.split(head)[1:]:
        loop = part[: part.index("\n        }\n")]
        texts = re.findall(r't\.first == "([^"]+)"', loop)
        assert all(word.encode()[:1] in (b"<", b"[", b"_", b"\xe2") for word in texts)
        # Nothing else is asked of a token's text; what else stands there is a log's.
        assert loop.count("t.first") == len(texts) + loop.count("t.first.c_str()")
        compared += len(texts)
    assert compared > 60


@pytest.mark.parametrize("prefix", [True, False], ids=["a space before every text", "none"])
def test_a_schema_works_where_the_answer_begins_with_a_plain_word(
    prefix: bool, llama: LlamaCpp, tmp_path: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", hidden=256, vocabulary=520, prefix=prefix)
    (model / "chat_template.jinja").write_text(PLAIN_WORD_TEMPLATE)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"add_prefix_space": prefix}))
    to_gguf(model, tmp_path, llama)
    form = {"type": "json_schema", "json_schema": {"name": "works", "schema": SCHEMA, "strict": True}}
    # The weights are random: without a line break there is little but the schema to say.
    body = {
        "messages": [{"role": "user", "content": "Does this work?"}],
        "response_format": form,
        "temperature": 0,
        "max_tokens": 40,
    }
    with serving(llama, tmp_path / convert.OUTPUT, "-c", "512") as url:
        status, said = _chat(url, body)
    assert status == 200, said
    answer = said["choices"][0]["message"]["content"]
    assert re.match(r'\{\s*("works|$)', answer), answer


def _chat(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    return _post(url, "/chat/completions", body)


def _post(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    return Client(address.hostname, address.port, timeout_s=60).request("POST", address.path + path, body)


def test_a_role_is_one_of_openai_s_or_one_that_the_template_names(llama: LlamaCpp, tmp_path: Path) -> None:
    model = make_tiny_checkpoint(tmp_path / "model", hidden=256, vocabulary=520)
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message['role'] == 'context' %}{{ message['content'] }}"
        "{% elif message['role'] == \"quoted\" %}{{ message['content'] }}"
        "{% elif message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% else %}"
        "{{ message['role'] + ': ' + message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    to_gguf(model, tmp_path, llama)
    with serving(llama, tmp_path / convert.OUTPUT, "-c", "512") as url:
        for role in ("system", "developer", "user", "context", "quoted"):
            body = {"messages": [{"role": role, "content": "x"}, {"role": "user", "content": "x"}], "max_tokens": 1}
            assert _chat(url, body)[0] == 200, role
        for role in ("wizard", "message", "Context"):
            body = {"messages": [{"role": role, "content": "x"}]}
            status, said = _chat(url, body)
            assert (status, said["error"]["message"]) == (400, f"Missing or unknown role: '{role}'")
        status, said = _chat(url, {"messages": [{"role": "tool", "content": "x"}]})
    assert status == 400
    assert "no tools here" in said["error"]["message"]


TOOLS_TEMPLATE = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for message in messages %}<|turn|>{{ message['role'] }}
{% if message['content'] %}{{ message['content'] }}{% endif %}
{%- for call in message['tool_calls'] or [] %}{% set called = call['function'] -%}
<tool_call>{"name": "{{ called['name'] }}", "arguments": {{ called['arguments'] | tojson }}}</tool_call>
{%- endfor %}<|fin|>{% endfor %}
{%- if add_generation_prompt %}<|turn|>assistant
{% endif %}"""
ONE = {"type": "object", "properties": {"n": {"enum": [1]}}, "required": ["n"], "additionalProperties": False}


def test_a_tool_that_is_chosen_by_its_name_is_called(llama: LlamaCpp, tmp_path: Path) -> None:
    """The model calls f, whatever it is asked, but where the grammar does not let it."""
    answer = ("<tool_call>", '{"name": "', "f", '", "arguments": {"n": 1}}', "</tool_call>")
    model = tiny_chat.write_gguf(tmp_path / "model.gguf", answer=answer, template=TOOLS_TEMPLATE)
    message = {"messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 100}
    tools = [{"type": "function", "function": {"name": name, "parameters": ONE}} for name in "fg"]
    with serving(llama, model, "-c", "1024") as url:
        for choice, called in [
            *((name, "f") for name in ("auto", "required")),
            *((_named(name), name) for name in "fg"),
        ]:
            status, said = _chat(url, {**message, "tools": tools, "tool_choice": choice})
            assert status == 200, said
            (call,) = said["choices"][0]["message"]["tool_calls"]
            assert call["function"]["name"] == called
            assert json.loads(call["function"]["arguments"]) == {"n": 1}
        asked = {"input": "x", "tools": [{"type": "function", "name": name, "parameters": ONE} for name in "fg"]}
        status, said = _post(
            url, "/responses", {**asked, "temperature": 0, "tool_choice": {"type": "function", "name": "g"}}
        )
        assert (status, [item["name"] for item in said["output"]]) == (200, ["g"])
        forms = [{"name": name, "input_schema": ONE} for name in "fg"]
        status, said = _post(
            url, "/messages", {**message, "tools": forms, "tool_choice": {"type": "tool", "name": "g"}}
        )
        assert (status, [item["name"] for item in said["content"]]) == (200, ["g"])
        status, said = _chat(url, {**message, "tools": tools, "tool_choice": _named("h")})
    assert (status, said["error"]["message"]) == (400, "'tool_choice' names no tool of the request: 'h'")


def _named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
