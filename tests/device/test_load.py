"""A served bundle under load and under bad input: what is refused, what is survived, and what is known not to be."""

import collections
import contextlib
import copy
import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.device import bundles, load, tiny_chat
from tests.device.served import Served, serving
from toolchain.device import files, serve
from toolchain.device.client import Client
from toolchain.device.errors import DeviceError, UsageError
from toolchain.errors import HostError
from toolchain.gguf import llama_cpp
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
KEY = "Open-Sesame-4711"
CHAT = load.PATH
_RSS_GROWTH_KIB = 32 << 10
JSON = {"Content-Type": "application/json"}
LET_IN = {**JSON, "Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = read_target("x86-cpu")
    try:
        llama = llama_cpp.find(target.runtime.cmake)
    except HostError as error:
        pytest.skip(error.message)
    return bundles.around(llama, target, tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text(KEY + "\n")
    return path


@pytest.fixture(scope="module")
def shared(bundle: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(bundle, tmp_path_factory.mktemp("log") / "log", "--api-key-file", str(key_file)) as running:
        yield running


@pytest.fixture
def server(shared: Served) -> Iterator[Served]:
    """A server that must be the same process, and answer correctly, when the test is over."""
    pid = shared.server_pid()
    assert pid
    yield shared
    assert shared.server_pid() == pid
    assert said(shared) == tiny_chat.ANSWER


def client(server: Served, timeout_s: float = 60) -> Client:
    return Client("127.0.0.1", server.port, KEY, timeout_s)


def said(server: Served, timeout_s: float = 60, **options: Any) -> str:
    answer = client(server, timeout_s).post(CHAT, load.body(**options))
    return str(answer["choices"][0]["message"]["content"])


def asked(
    server: Served,
    method: str,
    path: str,
    body: object = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 60,
) -> tuple[int, bytes]:
    """Status and body. A `body` of bytes goes as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body)
        connection.request(method, path, content, LET_IN if headers is None else headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def error_of(answer: bytes) -> str:
    """The message of an answer that is one JSON error and nothing else."""
    content = json.loads(answer)
    assert list(content) == ["error"]
    return str(content["error"]["message"])


def raw(server: Served, sent: bytes, timeout_s: float = 20) -> bytes:
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout_s) as connection:
        received = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)  # it would be waited for more, for five seconds
            while part := connection.recv(65536):
                received += part
        return received


def post_head(*lines: str) -> bytes:
    head = (f"POST {CHAT} HTTP/1.1", "Host: a", *(f"{name}: {value}" for name, value in LET_IN.items()), *lines)
    return "\r\n".join(head).encode() + b"\r\n\r\n"


@contextlib.contextmanager
def connections(server: Served, number: int, sent: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many open connections, on each of which this was sent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    opened = []
    try:
        for _ in range(number):
            opened.append(socket.create_connection(("127.0.0.1", server.port), 20))
            opened[-1].sendall(sent)
        yield opened
    finally:
        for one in opened:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def schema(of: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": of}}}


def test_a_mixed_load_of_500_requests_leaves_the_server_as_it_was(bundle: Path, key_file: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "log", "--api-key-file", str(key_file)) as server:
        pid, context = server.server_pid(), tiny_chat.CONTEXT
        fresh = server.usage()
        samples = load.run(client(server), context=context, requests=100, clients=8)
        warm = server.settled(fresh["threads"], fresh["descriptors"])
        samples += load.run(client(server), context=context, requests=400, clients=8)
        after = server.settled(warm["threads"], warm["descriptors"])
        assert [sample for sample in samples if sample.wrong is not None] == []
        counts = {kind: sum(sample.kind == kind for sample in samples) for kind in load.KINDS}
        assert sum(counts.values()) == 500
        assert min(counts.values()) >= 80
        shown = load.summary(samples)
        assert {kind for kind, found in shown.items() if "ttft_s" in found} == {"streamed", "cancelled"}
        for found in shown.values():
            times = list(found["whole_s"].values())
            assert 0 < times[0] <= times[1] <= times[2] <= max(sample.whole_s for sample in samples) + 1e-4
        assert said(server) == tiny_chat.ANSWER
        assert server.server_pid() == pid
        assert after["rss_kib"] - warm["rss_kib"] < _RSS_GROWTH_KIB
        assert after["threads"] <= warm["threads"]
        assert after["descriptors"] <= warm["descriptors"]
        log = server.log()
    # The log has something to say of these requests, and none of it is theirs.
    assert "exceeds the available context size" in log
    assert load.MARKER not in log


def test_percentiles_are_values_that_were_seen() -> None:
    samples = [load.Sample("whole", number / 100, None, None) for number in range(1, 101)]
    shown = load.summary([*samples, load.Sample("streamed", 2.0, 1.0, "odd")])
    assert shown["whole"]["whole_s"] == {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    assert shown["streamed"]["wrong"] == 1
    assert shown["streamed"]["ttft_s"]["p99"] == 1.0


def test_the_table_has_a_row_for_each_kind() -> None:
    samples = [load.Sample("whole", 0.25, None, None), load.Sample("streamed", 2.0, 0.5, "odd")]
    usage = {"rss_kib": 51200}
    facts = {"requests": 2, "clients": 8, "elapsed_s": 2.25, "model_bytes": 85_800_000, "parallel": 1, "threads": 2}
    conditions = {"processor": "a CPU", "foreign_cpu_share": 0.012, "usage_before": usage, "usage_after": usage}
    lines = load.table({**facts, **conditions, "kinds": load.summary(samples)}).splitlines()
    assert lines[0].startswith("2 requests by 8 clients in 2 s, a model of 85.8 MB, slots: 1, a CPU, 2 threads; other")
    assert lines[-2:] == [
        "| whole | 1 | 0 |  | 250, 250, 250 |",
        "| streamed | 1 | 1 | 500, 500, 500 | 2000, 2000, 2000 |",
    ]


def _user(content: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 5}


NESTED = b"[" * 100_000 + b"]" * 100_000


def _nested(depth: int) -> dict[str, Any]:
    """A schema for `depth` lists, one in the other."""
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth - 1):
        found = {"items": found}
    return found


def _referring(depth: int) -> dict[str, Any]:
    """The same by references."""
    lists = {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**lists, f"d{depth}": {"type": "string"}}}


def _multiplying(depth: int, alternatives: int) -> dict[str, Any]:
    """Definitions each of which has the next one in every alternative."""
    unions = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * alternatives} for n in range(depth)}
    return {**unions, f"d{depth}": {"type": "string"}}


def _optional(count: int) -> dict[str, Any]:
    return {"properties": {f"p{number}": {"type": "string"} for number in range(count)}}


def _required(count: int) -> dict[str, Any]:
    """Properties whose names have no character that the name of a rule may have."""
    names = [chr(0x4E00 + number) for number in range(count)]
    return {"properties": {name: {"type": "integer"} for name in names}, "required": names}


def _brackets(depth: int) -> str:
    return f'root ::= {"(" * depth}"a"{")" * depth}'


def _ways(count: int) -> str:
    """Rules that each have two ways to the next, all before the first character."""
    rules = [f'r{number} ::= r{number + 1} "x" | r{number + 1} "y"' for number in range(count)]
    return "\n".join(["root ::= r0", *rules, f'r{count} ::= "a"'])


def _alternatives(depth: int, count: int) -> str:
    rules = [f'r{number} ::= r{number + 1} "a"' for number in range(depth)]
    return "\n".join(["root ::= r0", *rules, f"r{depth} ::= " + "|".join(['"x"'] * count)])


# Each "a" begins one or two more of the same, and nothing says which: 2ⁿ stacks after n of them.
_AMBIGUOUS = 'root ::= e\ne ::= "a" e e? "x" | "a" e e? "y" | "b"'


def _tools(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "parameters": _optional(1)}} for name in names]


def _rules(count: int) -> str:
    steps = [f"r{number} ::= r{number + 1}" for number in range(count)]
    return "\n".join(["root ::= r0", *steps, f'r{count} ::= "a"'])


REFUSED = {
    "not JSON": (b"hello", "parse error at line 1, column 1"),
    "no body": (b"", "attempting to parse an empty input"),
    "binary": (bytes(range(256)) * 40, "parse error"),
    "a NUL byte": (b'{"messages":[{"role":"user","content":"a\x00b"}]}', "control character U+0000"),
    "not UTF-8": (b'{"messages":[{"role":"user","content":"a\xff"}]}', "ill-formed UTF-8"),
    "half a surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "surrogate"),
    "100,000 open brackets": (b"[" * 100_000, "nested more than 1000 deep"),
    "100,000 nested lists": (NESTED, "nested more than 1000 deep"),
    "nested lists as content": (
        b'{"messages":[{"role":"user","content":' + NESTED + b"}]}",
        "nested more than 1000 deep",
    ),
    "a list": ([1], "'messages' is required"),
    "no messages": ({}, "'messages' is required"),
    "messages that are none": ({"messages": []}, "an array of at least one"),
    "messages as text": ({"messages": "hi"}, "to be an array"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "unknown role: ''"),
    "a role that is empty": ({"messages": [{"role": "", "content": "x"}]}, "unknown role: ''"),
    "a role that nobody knows": ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role: 'wizard'"),
    "content as a number": (_user(7), "to be a string or an array"),
    "a prompt of 1 MB": (_user("x" * 1_000_000), "exceeds the available context size (1024 tokens)"),
    "max_tokens -2": (load.body(max_tokens=-2), "must be between -1"),
    "max_tokens as text": (load.body(max_tokens="ten"), "must be number"),
    "n 1000": (load.body(n=1000), "must be between 1 <= value <= 1"),
    "n -1": (load.body(n=-1), "must be between 1 <= value <= 1"),
    "temperature as text": (load.body(temperature="hot"), "must be number"),
    "temperature NaN": (load.body(temperature=float("nan")), "parse error"),
    "temperature 1e999": (b'{"messages":[],"temperature":1e999}', "number overflow"),
    "stream as text": (load.body(stream="yes"), "'stream': "),
    "stop as numbers": (load.body(stop=[1, 2]), "must be string"),
    "response_format that is text": (load.body(response_format="x"), "'response_format' must be an object"),
    "a picture": (
        _user([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]),
        "not supported",
    ),
    "tools that are none": (load.body(tools=[{"x": 1}]), "Missing tool type"),
    "a tool of another name": (
        load.body(tools=_tools("f"), tool_choice={"type": "function", "function": {"name": "g"}}),
        "'tool_choice' names no tool of the request: 'g'",
    ),
    "a choice of no tools": (load.body(tool_choice={"type": "function"}), "names no tool of the request: ''"),
    "a choice of several tools": (
        load.body(tools=_tools("f"), tool_choice={"type": "allowed_tools", "allowed_tools": {}}),
        "of type 'allowed_tools' is not supported",
    ),
    "a call of a tool where the template has none": (
        load.body(tools=_tools("f"), tool_choice="required"),
        "the model's chat template has no calls",
    ),
    "a choice that is a number": (load.body(tools=_tools("f"), tool_choice=1), "must be string"),
    "a schema that is text": (load.body(**schema("x")), "a JSON schema must be an object"),
    "a schema of no known type": (load.body(**schema({"type": "wizard"})), "unrecognized type wizard"),
    "a schema with a wrong reference": (load.body(**schema({"$ref": "#/no"})), "cannot resolve $ref"),
    "a schema from elsewhere": (load.body(**schema({"$ref": "http://127.0.0.1:1/x"})), "only references into"),
    "a schema with a wrong pattern": (
        load.body(**schema({"type": "string", "pattern": "^((($"})),
        "unbalanced parentheses",
    ),
    "a schema of 10⁹ items": (
        load.body(**schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9})),
        "failed to parse grammar",
    ),
    "a schema that is a circle": (
        load.body(**schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}})),
        "failed to parse grammar",
    ),
    "a schema nested 101 deep": (load.body(**schema(_nested(101))), "nested more than 100 deep"),
    "references nested 102 deep": (load.body(**schema(_referring(50))), "nested more than 100 deep"),
    "a name of 1001 bytes": (load.body(**schema({"properties": {"x" * 1001: {}}})), "longer than 1000 bytes"),
    "a schema that makes 1 MiB": (load.body(**schema({"enum": ["x" * 2**20]})), "a grammar of more than 1 MiB"),
    "3,000 optional properties": (load.body(**schema(_optional(3000))), "failed to parse grammar"),
    "a grammar that is a number": (load.body(grammar=5), "'grammar': "),
    "a grammar of 50,000 brackets": (load.body(grammar=_brackets(50_000)), "groups nested more than 2000 deep"),
    "a grammar of 100,000 rules in a row": (load.body(grammar=_rules(100_000)), "failed to parse grammar"),
    "a grammar that is wrong": (load.body(grammar='root ::= a\na ::= "b" [c'), "unexpected end of input"),
    "a grammar that is wrong in its second line": (
        load.body(grammar='root ::= a\na ::= ("b" | +c)\nd ::= "e"'),
        "expecting preceding item to */+/?/{ in line 2",
    ),
    "a grammar with a rule that is missing": (load.body(grammar="root ::= a"), "Undefined rule identifier 'a'"),
    "a grammar with 2⁶⁰ ways": (load.body(grammar=_ways(60)), "too many choices at one place"),
    "a grammar with 2ⁿ ways after n characters": (
        load.body(grammar=_AMBIGUOUS, logit_bias={"97": 100}),
        "too many choices at one place",
    ),
    "a repetition of 5 to 3": (load.body(grammar='root ::= "a"{5,3}'), "maximum is below its minimum"),
    "5 to 3 characters": (load.body(**schema({"type": "string", "minLength": 5, "maxLength": 3})), "below its minimum"),
    "2,000 times 1 MB": (load.body(grammar=f'root ::= "{"a" * 10**6}"{{2000}}'), "failed to parse grammar"),
    "500,000 choices 2,500 rules deep": (load.body(grammar=_alternatives(2500, 500_000)), "too many choices"),
    "a grammar without a root": (load.body(grammar='a ::= "b"'), "failed to parse grammar"),
    "a grammar that recurs to the left": (load.body(grammar='root ::= root "a"'), "failed to parse grammar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_by_one_json_error(server: Served, name: str) -> None:
    body, message = REFUSED[name]
    status, answer = asked(server, "POST", CHAT, body)
    assert status == 400
    assert message in error_of(answer)


WITHIN_LIMITS: dict[str, dict[str, Any]] = {
    "a schema nested 100 deep": schema(_nested(100)),
    "references nested 100 deep": schema(_referring(49)),  # each list and each reference is one deep
    "references that multiply": schema({"$ref": "#/$defs/d0", "$defs": _multiplying(12, 10)}),
    "a name of 1000 bytes": schema({"properties": {"x" * 1000: {"type": "string"}}}),
    "1,000 optional properties": schema(_optional(1000)),
    "20,000 values": schema({"enum": [f"{number:05}" for number in range(20_000)]}),
    "a pattern of 3,000 words": schema({"type": "string", "pattern": f"^({'|'.join(f'w{n}' for n in range(3000))})$"}),
    "5,000 optional groups": {"grammar": 'root ::= "b" ' + '("a")? ' * 5000},
    "5,000 optional choices of two rules": {"grammar": f'root ::= "b" {"(a | b)? " * 5000}\na ::= "a"\nb ::= "b"'},
    "5,000 names of one rule": schema(_required(5000)),
    "a million objects beside": {"metadata": [{}] * 10**6},
    "2,000 brackets in a text": {"stop": ['\\"' + "[" * 2000]},
    "a grammar of 1,900 brackets": {"grammar": _brackets(1900)},
    "a grammar of 9,000 rules in a row": {"grammar": _rules(9000)},
}


@pytest.mark.parametrize(("choice", "status"), [("none", 200), ("auto", 200), ("any", 400), ("odd", 400)])
def test_anthropic_s_choices_of_tools(server: Served, choice: str, status: int) -> None:
    """This model's template has no calls."""
    body = {**_user("x"), "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": choice}}
    assert asked(server, "POST", "/v1/messages", body)[0] == status


def test_an_unknown_trigger_of_a_grammar_is_refused(server: Served) -> None:
    body = {"prompt": "a", "grammar_triggers": [{"type": 9, "value": "x"}]}
    status, answer = asked(server, "POST", "/completion", body)
    assert status == 400
    assert "unknown type of a grammar's trigger" in error_of(answer)


@pytest.mark.parametrize("tokens", [[1, -1], [10**7]])
def test_ids_of_no_token_are_refused(server: Served, tokens: list[int]) -> None:
    status, answer = asked(server, "POST", "/detokenize", {"tokens": tokens})
    assert (status, error_of(answer)) == (400, f"'tokens' has an id that is none: {tokens[-1]}")


@pytest.mark.parametrize("name", WITHIN_LIMITS)
def test_what_is_within_the_limits_is_answered(server: Served, name: str) -> None:
    assert said(server, timeout_s=20, **WITHIN_LIMITS[name])


VALID: list[dict[str, Any]] = [
    load.body(
        tools=[{"type": "function", "function": {"name": "f", "parameters": _optional(2)}}],
        tool_choice="auto",
        messages=[
            {"role": "system", "content": "x"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ],
    ),
    load.body(
        **schema(
            {
                "properties": {
                    "list": {"type": "array", "items": {"$ref": "#/$defs/t"}, "minItems": 1, "maxItems": 3},
                    "one": {"anyOf": [{"type": "string", "maxLength": 5}, {"const": 4}, {"enum": ["a", None]}]},
                    "text": {"type": "string", "pattern": "^a+(b|c){1,3}$"},
                },
                "required": ["list"],
                "additionalProperties": {"type": "integer", "minimum": -5, "maximum": 1000},
                "$defs": {"t": {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}},
            }
        )
    ),
    load.body(
        grammar='root ::= ("a" | [b-z]{2,5})+ w?\nw ::= "x"',
        logit_bias={"5": 1.5},
        stop=["x"],
        samplers=["top_k"],
        n_probs=2,
        mirostat=1,
        logprobs=True,
        id_slot=-1,
    ),
]
ODD: list[Any] = [
    *(None, True, 0, -1, 2**31, 2**40, 1.5, -1e308, "", "x", "\0", "ü" * 300, "auto", "json_object"),
    *([], {}, [[]], [{}], ["a"], [1, 2], {"": {}}, {"type": "object"}, {"type": ["string", "null"]}),
    *({"$ref": "#"}, {"$ref": "#/$defs/t"}, "#/$defs/t", "(((", "^(a|b)*$", "[", "\\", "a{99999999}", "root ::= root"),
]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value`, with each key or index of it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _changed(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A copy in which a thing or two is missing, another, odd, or in a wrong place."""
    found = copy.deepcopy(body)
    for _ in range(chance.randint(1, 2)):
        places = list(_places(found))
        where, key = chance.choice(places)
        what = chance.choice(["odd", "odd", "gone", "moved", "torn"])
        if what == "gone":
            del where[key]
        elif what == "torn" and isinstance(where[key], str):
            at = chance.randint(0, len(where[key]))
            where[key] = where[key][:at] + chance.choice('()[]{}|*+?\\".-^$ \n') + where[key][at:]
        else:
            other, name = chance.choice(places)
            where[key] = copy.deepcopy(other[name] if what == "moved" else chance.choice(ODD))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_wrong_in_a_request_is_answered_or_refused(server: Served, seed: int) -> None:
    chance = random.Random(seed)
    statuses = collections.Counter[int]()
    for _ in range(100):
        body = _changed(chance.choice(VALID), chance)
        status, answer = asked(server, "POST", CHAT, body)
        assert status == 200 or (status == 400 and error_of(answer)), body
        statuses[status] += 1
    assert min(statuses[200], statuses[400]) > 20


@pytest.mark.parametrize(("size", "status"), [(4 << 20, 400), ((4 << 20) + 1, 413)])
def test_a_body_has_4_mib_at_most(server: Served, size: int, status: int) -> None:
    head, _, rest = raw(server, post_head(f"Content-Length: {size}") + b"x" * size).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert error_of(rest) == "Request body longer than 4 MiB" if status == 413 else "parse error" in error_of(rest)


def test_what_a_request_says_is_not_in_the_log(bundle: Path, key_file: Path, tmp_path: Path) -> None:
    secret = "basilisk"
    refused = [
        f'{{"messages":[{{"role":"user","content":"{secret} '.encode() + b"\xff",
        {"messages": [{"content": secret}]},
        load.body(tools=[{secret: 1}]),
        load.body(**schema({"type": secret})),
        load.body(grammar=f'root ::= "a"\n{secret} ::= (((\n1.2 E {secret}'),
        load.body(grammar=f"root ::= {secret}"),
        load.body(f"{secret} " * tiny_chat.CONTEXT),
        _user([{"type": secret}]),
    ]
    taken = [
        (CHAT, load.body(samplers=[secret], max_tokens=2)),
        (CHAT, load.body(**schema({"type": "string", "pattern": f"^\n\\b{secret}$"}))),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2, "tools": [{"type": secret}]}),
        ("/v1/messages", {**_user("x"), "system": f"x-anthropic-billing-header: cch=12345 {secret}"}),
    ]
    with serving(bundle, tmp_path / "log", "--api-key-file", str(key_file)) as server:
        for body in refused:
            status, _ = asked(server, "POST", CHAT, body)
            assert status == 400
        for path, body in taken:
            status, answer = asked(server, "POST", path, body)
            assert status == 200, answer
        server.wait_logged("total time", len(taken))  # of the last answer
        log = server.log()
    assert secret not in log
    assert log.count("got exception: status 400\n") == 5
    assert log.count("error: Failed to initialize samplers: failed to parse grammar: ") == 2
    assert "unable to match a sampler by its name" in log
    assert "1 patterns accept any string" in log
    assert "unsupported Responses tool type skipped" in log
    assert "anthropic string not as expected" in log


WRONG_KEYS = {
    "none": {},
    "another": {"Authorization": "Bearer nope"},
    "in capitals": {"Authorization": f"Bearer {KEY.upper()}"},
    "empty": {"Authorization": "Bearer "},
    "a part": {"Authorization": f"Bearer {KEY[:-1]}"},
    "with more": {"Authorization": f"Bearer {KEY},x"},
    "another scheme": {"Authorization": f"Basic {KEY}"},
}


@pytest.mark.parametrize("name", WRONG_KEYS)
@pytest.mark.parametrize("path", [CHAT, "/metrics", "/props", "/v1/models", "/tokenize", "/nothing", "/sw.js"])
def test_nothing_but_health_is_answered_without_the_key(server: Served, name: str, path: str) -> None:
    for method in ("GET", "POST"):
        status, answer = asked(server, method, path, load.body(), {**JSON, **WRONG_KEYS[name]})
        assert status == 401
        assert error_of(answer) == "Invalid API Key"
    assert asked(server, "GET", "/health", headers={})[0] == 200


PATHS = (
    *("/nothing", "/../manifest.json", "/%2e%2e/manifest.json", "/..%2fmanifest.json", "//etc/passwd", "/%00"),
    *("/....//manifest.json", "/\\..\\manifest.json", "/model/model.gguf", "/manifest.json"),
)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_not_served_is_not_found(server: Served, path: str) -> None:
    status, answer = asked(server, "GET", path)
    assert (status, error_of(answer)) == (404, "File Not Found")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_a_wrong_method_is_not_found(server: Served, method: str) -> None:
    status, answer = asked(server, method, CHAT)
    assert (status, error_of(answer)) == (404, "File Not Found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/slots", 501),
        ("POST", "/slots/0?action=save", 501),
        ("POST", "/props", 501),
        ("GET", "/tools", 403),
        ("GET", "/cors-proxy?url=http://127.0.0.1/", 403),
        ("POST", "/models/load", 404),
    ],
)
def test_what_a_bundle_has_no_use_for_is_off(server: Served, method: str, path: str, status: int) -> None:
    found, answer = asked(server, method, path, {"filename": "x", "model": "x"} if method == "POST" else None)
    assert found == status
    assert error_of(answer)


def test_metrics_count_what_is_answered_and_want_the_key(server: Served) -> None:
    def count(name: str) -> float:
        status, answer = asked(server, "GET", "/metrics")
        assert status == 200
        (line,) = (line for line in answer.decode().splitlines() if line.startswith(f"llamacpp:{name} "))
        return float(line.split()[1])

    names = ("prompt_tokens_total", "prompt_tokens_cached_total", "tokens_predicted_total")
    said(server)
    before = {name: count(name) for name in names}
    client(server).chat(load.body()["messages"], max_tokens=50, temperature=0)
    client(server).stream_chat(load.body()["messages"], max_tokens=50, temperature=0)
    after = {name: count(name) for name in names}
    assert after["tokens_predicted_total"] - before["tokens_predicted_total"] == 2 * (len(tiny_chat.ANSWER) + 1)
    assert after["prompt_tokens_total"] > before["prompt_tokens_total"]


@pytest.mark.parametrize("max_tokens", [-1, None, 2**31 - 1])
def test_an_answer_without_a_limit_ends_where_the_context_is_full(server: Served, max_tokens: int | None) -> None:
    answer = client(server).post(CHAT, load.body(max_tokens=max_tokens, ignore_eos=True))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == tiny_chat.CONTEXT


def test_ten_thousand_stop_strings_are_taken(server: Served) -> None:
    assert said(server, stop=[f"s{number}" for number in range(10_000)] + ["y"]) == "He"


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("a length below zero", post_head("Content-Length: -5")),
        ("a length that is text", post_head("Content-Length: abc") + b"{}"),
        ("a length beyond 64 bits", post_head("Content-Length: 99999999999999999999999") + b"{}"),
        ("two lengths", post_head("Content-Length: 2", "Content-Length: 5") + b"{}"),
        ("wrong chunks", post_head("Transfer-Encoding: chunked") + b"zz\r\nhello\r\n"),
        ("chunks and a length", post_head("Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01" + bytes(range(200)) + b"\r\n\r\n"),
        ("HTTP 9.9", b"GET /health HTTP/9.9\r\n\r\n"),
        ("a header of 100 kB", b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"),
    ],
)
def test_what_is_not_http_is_refused_with_400_and_closed(server: Served, name: str, sent: bytes) -> None:
    """Without a JSON error: the server's HTTP library answers before the server sees the request."""
    head, _, rest = raw(server, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Length: 0" in head
    assert rest == b""


@pytest.mark.parametrize("second", [b"\x00\x01JUNK\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_of_pipelined_requests_the_first_is_answered_and_the_rest_dropped(server: Served, second: bytes) -> None:
    received = raw(server, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + second)
    assert received.startswith(b"HTTP/1.1 200 ")
    assert received.count(b"HTTP/1.1 ") == 1


def test_slow_and_silent_clients_do_not_hold_up_the_others(server: Served) -> None:
    with connections(server, 8, post_head("Content-Length: 99999999")) as silent, connections(server, 8) as slow:
        for byte in post_head("Content-Length: 2")[:3]:
            for one in slow:
                with contextlib.suppress(ConnectionError):  # on a busy machine, more than five seconds may have passed
                    one.sendall(bytes([byte]))
            # Not only after the silent ones have been hung up on, which takes 30 s.
            assert said(server, timeout_s=20) == tiny_chat.ANSWER
            time.sleep(1)
        assert len(silent) == 8


def test_the_next_after_a_burst_of_silent_clients_is_answered(bundle: Path, key_file: Path, tmp_path: Path) -> None:
    """By a server that is new: one that has served has more threads for a while."""
    with (
        serving(bundle, tmp_path / "log", "--api-key-file", str(key_file)) as server,
        connections(server, 16, post_head("Content-Length: 5")),
    ):
        assert said(server, timeout_s=20) == tiny_chat.ANSWER


def test_clients_that_do_not_read_do_not_hold_up_the_others(server: Served) -> None:
    content = json.dumps(load.body(max_tokens=900, ignore_eos=True, stream=True)).encode()
    with connections(server, 4, post_head(f"Content-Length: {len(content)}") + content):
        assert said(server) == tiny_chat.ANSWER


def test_a_thousand_idle_connections_do_not_hold_up_the_others(server: Served) -> None:
    before = server.usage()
    with connections(server, 1000):
        assert said(server) == tiny_chat.ANSWER
    after = server.settled(before["threads"], before["descriptors"])
    assert after["threads"] <= before["threads"]
    assert after["descriptors"] <= before["descriptors"]


def test_more_connections_than_descriptors_only_wait(bundle: Path, key_file: Path, tmp_path: Path) -> None:
    with (
        serving(bundle, tmp_path / "log", "--api-key-file", str(key_file), files=128) as server,
        connections(server, 300),
    ):
        assert said(server) == tiny_chat.ANSWER


@pytest.fixture
def hasty(bundle: Path, tmp_path: Path) -> Path:
    """A copy whose server hangs up on a silent client after one second."""
    copy = Path(shutil.copytree(bundle, tmp_path / "hasty"))
    presets = json.loads((copy / "presets.json").read_text())
    argv = presets["server"]["argv"]
    argv[argv.index("--timeout") + 1] = "1"
    (copy / "presets.json").write_text(json.dumps(presets))
    return copy


def test_half_requests_hold_the_server_up_only_for_the_timeout(hasty: Path, key_file: Path, tmp_path: Path) -> None:
    with (
        serving(hasty, tmp_path / "log", "--api-key-file", str(key_file)) as server,
        connections(server, 1100, post_head("Content-Length: 5")) as opened,
    ):
        assert said(server) == tiny_chat.ANSWER
        opened[0].settimeout(20)
        assert opened[0].recv(100)[:12] in (b"", b"HTTP/1.1 400")


# Limits of the server, as docs/device.md states them: a better llama.cpp makes these tests fail.

TAKEN = {
    "max_tokens 0": (load.body(max_tokens=0), "H"),
    "max_tokens 2⁴⁰, cut to 32 bits": (load.body(max_tokens=2**40), "H"),
    "temperature below zero": (load.body(temperature=-1), "Hey."),
    "temperature 1e308": (load.body(temperature=1e308, top_k=1), "Hey."),
    "logit_bias that is text": (load.body(logit_bias="junk"), "Hey."),
    "logit_bias of tokens that are none": (load.body(logit_bias=[[99999999, 1], [-1, 5], [5], []]), "Hey."),
    "an empty stop string": (load.body(stop=[""]), ""),
    "a model that is another": (load.body(model="another"), "Hey."),
}


@pytest.mark.parametrize("name", TAKEN)
def test_limit_these_are_taken_without_a_word(server: Served, name: str) -> None:
    body, text = TAKEN[name]
    assert client(server).post(CHAT, body)["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_limit_a_request_of_another_content_type_is_taken(server: Served, kind: str) -> None:
    assert asked(server, "POST", CHAT, load.body(), {**LET_IN, "Content-Type": kind})[0] == 200


def test_limit_a_long_prompt_takes_far_more_memory_than_it_has_bytes(server: Served) -> None:
    def peak_bytes() -> int:
        lines = Path(f"/proc/{server.server_pid()}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    before, size = peak_bytes(), 4_000_000
    assert asked(server, "POST", CHAT, _user("x" * size))[0] == 400
    assert peak_bytes() - before > 20 * size


# edgectl serve


def test_sigterm_in_the_middle_of_streamed_answers_stops_within_the_grace_time(
    bundle: Path, key_file: Path, tmp_path: Path
) -> None:
    content = json.dumps(load.body(max_tokens=900, ignore_eos=True, stream=True)).encode()
    sent = post_head(f"Content-Length: {len(content)}") + content
    with (
        serving(bundle, tmp_path / "log", "--api-key-file", str(key_file)) as server,
        connections(server, 8, sent) as streams,
    ):
        assert b"200 OK" in streams[0].recv(100)
        start_s = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        assert server.child.wait(30) == 143
        # Ten seconds after SIGTERM it would have been killed.
        assert time.monotonic() - start_s < 20
        assert "Traceback" not in server.log()
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while part := streams[-1].recv(65536):
                rest += part
        assert b"[DONE]" not in rest


def _children_that_serve() -> list[int]:
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            if b"llama-server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                found.append(pid)
    return found


def test_a_server_that_ends_seven_times_in_a_row_ends_edgectl(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.Restarts, "FIRST_S", 0.001)
    said_lines: list[str] = []
    killed: set[int] = set()

    def say(line: str) -> None:
        said_lines.append(line)
        if line.startswith("ready after"):
            (pid,) = _children_that_serve()
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    with pytest.raises(DeviceError, match=r"SIGKILL .*; it ended 7 times in a row") as ended:
        serve.run(files.open_bundle(bundle), host="127.0.0.1", port=serve.free_port(), key_file=None, say=say)
    assert ended.value.hint
    assert len(killed) == 7
    assert sum("started again in" in line for line in said_lines) == 6


def test_a_key_from_the_environment_is_in_no_command_line(bundle: Path, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "log", EDGECTL_API_KEY=KEY) as server:
        assert said(server) == tiny_chat.ANSWER
        assert asked(server, "GET", "/v1/models", headers={})[0] == 401
        lines = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended in the meantime
                lines[int(path.parent.name)] = path.read_bytes()
        assert {server.child.pid, server.server_pid()} <= set(lines)
        assert [pid for pid, line in lines.items() if KEY.encode() in line] == []
        assert KEY not in server.log()


@pytest.mark.parametrize("key", ["", "  ", "a,b", "a\nb"])
def test_a_key_in_the_environment_that_cannot_be_one_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGECTL_API_KEY", key)
    with pytest.raises(UsageError, match="EDGECTL_API_KEY") as refused:
        serve.read_keys(None)
    assert refused.value.hint


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"# only a comment\n", b"\xff\xfe"])
def test_a_key_file_that_gives_no_key_is_refused(bundle: Path, tmp_path: Path, content: bytes | None) -> None:
    """None: it is a folder."""
    path = tmp_path / "key"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    done = bundles.edgectl(bundle, "serve", "--api-key-file", str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --api-key-file {path}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [f"{KEY}\r\n", f"{KEY} \n", f"good\n {KEY}\n", "schlüssel\n", "a\tb\n"])
def test_a_key_that_no_client_could_send_is_refused_with_its_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content.encode())
    with pytest.raises(UsageError, match=rf"line {content.count(chr(10))} ") as refused:
        serve.read_keys(path)
    assert KEY not in refused.value.message
    assert refused.value.hint


def test_every_key_of_a_file_is_let_in(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(f"# comment\n\nother, key\n{KEY}".encode())
    with serving(bundle, tmp_path / "log", "--api-key-file", str(tmp_path / "key")) as server:
        assert said(server) == tiny_chat.ANSWER
        other = {**JSON, "Authorization": "Bearer other, key"}
        assert asked(server, "GET", "/v1/models", headers=other)[0] == 200
