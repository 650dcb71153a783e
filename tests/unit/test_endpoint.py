"""The client of an OpenAI-compatible server, against a real server that misbehaves as it is told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

from tests.lines import Lines
from toolchain.data.answers import Candidate
from toolchain.data.rows import Message
from toolchain.errors import DataError, EndpointError, ToolchainError
from toolchain.recipe import Endpoint, Generate
from toolchain.teacher import endpoint as client
from toolchain.teacher.journal import Journal, Prompt

KEY = "sk-not-for-anyone-else"
Body = dict[str, Any]
Reply = tuple[int, dict[str, str], bytes]


def answer(text: str | None = "Fine.", finish: str | None = "stop", **more: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return as_json(200, {"model": "served", "choices": [choice], "usage": usage, **more})


def as_json(status: int, body: Any, **headers: str) -> Reply:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


def error(status: int, message: str, **headers: str) -> Reply:
    return as_json(status, {"error": {"message": message, "type": "x"}}, **headers)


class Server(ThreadingHTTPServer):
    """Answers "Fine." unless `script`, called with the request's number and body, says otherwise."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.busy = self.most_busy = 0
        self.models: Reply = as_json(200, {"data": [{"id": "one"}, {"id": "two"}]})
        self.script: Callable[[int, Body], Reply | bytes | list[bytes] | None] = lambda number, body: None
        self.end = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.requests]

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that went away is none of our concern."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(self.server.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            reply = self.server.script(number, body)
            self._send(answer() if reply is None else reply)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _send(self, reply: Reply | bytes | list[bytes]) -> None:
        if isinstance(reply, bytes | list):  # raw, a byte or a piece at a time, and then the line goes dead
            for piece in [reply] if isinstance(reply, bytes) else reply:
                self.wfile.write(piece)
                self.server.end.wait(0.02 if isinstance(reply, list) else 0)
            self.close_connection = True
            return
        status, headers, content = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(client, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield made
        made.end.set()
        made.shutdown()
        thread.join()


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(at, f"train.jsonl: row {at + 1}", (Message("user", f"Question {at}?"),), (), 20, 7**20 + at)
        for at in range(count)
    ]


def ask(
    server: Server,
    folder: Path,
    count: int = 1,
    *,
    generate: Generate | None = None,
    report: Lines | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], dict[int, Candidate]]:
    endpoint = Endpoint(**{"url": server.url, "model": "m", "concurrency": 1, "retries": 2, **settings})
    folder.mkdir(exist_ok=True)
    with Journal(folder / "resume" / "answers.jsonl") as journal:
        metrics = client.answer(
            generate or Generate(), prompts(count), endpoint=endpoint, journal=journal, report=report or Lines()
        )
        return metrics, journal.answers


def fails(server: Server, folder: Path, count: int = 1, **settings: Any) -> ToolchainError:
    with pytest.raises(ToolchainError) as caught:
        ask(server, folder, count, **settings)
    assert KEY not in caught.value.message + str(caught.value.hint)
    return caught.value


# --- Answers.


def test_every_question_is_asked_once_and_answered_in_its_place(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: answer(body["messages"][0]["content"].replace("Question", "Answer"))
    metrics, found = ask(server, tmp_path, 20, concurrency=4)
    assert {at: candidate.text for at, candidate in found.items()} == {at: f"Answer {at}?" for at in range(20)}
    assert sorted(server.asked()) == sorted(prompt.messages[0].content for prompt in prompts(20))
    assert server.most_busy <= 4
    assert (metrics["requests"], metrics["retries"], metrics["answers_resumed"]) == (20, 0, 0)
    assert (metrics["prompt_tokens"], metrics["answer_tokens"], metrics["cost"]) == (200, 100, None)
    assert metrics["served_model"] == "served"


def test_a_greedy_request_holds_no_seed_and_a_sampled_one_its_own(server: Server, tmp_path: Path) -> None:
    ask(server, tmp_path / "greedy")
    sampled = Generate(sampling_temperature=0.7, sampling_top_p=0.9)
    ask(server, tmp_path / "sampled", 2, generate=sampled)
    assert server.requests[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "Question 0?"}],
        "max_tokens": 20,
        "temperature": 0.0,
        "stream": False,
    }
    first, second = server.requests[1:]
    assert (first["temperature"], first["top_p"]) == (0.7, 0.9)
    assert 0 <= first["seed"] < 2**31
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_the_finish_is_what_the_server_says(server: Server, tmp_path: Path, finish: str) -> None:
    server.script = lambda number, body: answer("It is", finish)
    _, found = ask(server, tmp_path)
    assert found == {0: Candidate("It is", None, finish)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        (answer(""), "empty"),
        (answer(" \n"), "empty"),
        (answer(None), "empty"),
        (answer(None, "length"), "empty"),
        (answer("half", "content_filter"), "content_filter"),
        (answer(None, "tool_calls"), "tool_calls"),
    ],
)
def test_a_whole_answer_without_text_is_not_asked_again_and_is_counted(
    server: Server, tmp_path: Path, reply: Reply, note: str
) -> None:
    server.script = lambda number, body: reply
    metrics, found = ask(server, tmp_path)
    assert not found[0].text.strip()
    assert metrics["without_text"] == {note: 1}
    assert len(server.requests) == 1


def test_a_model_that_wants_its_limit_under_another_name_gets_it(server: Server, tmp_path: Path) -> None:
    def script(number: int, body: Body) -> Reply | None:
        old = "max_tokens" in body
        return error(400, "Unsupported parameter: use 'max_completion_tokens' instead.") if old else None

    server.script = script
    _, found = ask(server, tmp_path, 3)
    assert len(found) == 3
    assert [("max_completion_tokens" in body) for body in server.requests] == [False, True, True, True]


# --- What passes, and what does not.

TRUNCATED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n" + answer()[2][:60]
HALF_STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'2f\r\ndata: {"choices":[{"delta":{"content":"half"}}]}\r\n'
)
WHOLE_STREAM = (200, {"Content-Type": "text/event-stream"}, b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
PASSING: dict[str, tuple[Reply | bytes, str]] = {
    "500": (error(500, "oops"), "500: oops"),
    "503 in HTML": ((503, {"Content-Type": "text/html"}, b"<html>Bad gateway</html>"), "503: <html>Bad gateway"),
    "429": (error(429, "slow down", **{"Retry-After": "0"}), "429: slow down"),
    "408": (error(408, "late"), "408: late"),
    "409": (error(409, "conflict"), "409: conflict"),
    "truncated body": (TRUNCATED, "the connection broke"),
    "half a stream": (HALF_STREAM, "the connection broke"),
    "a stream nobody asked for": (WHOLE_STREAM, "not JSON but text/event-stream"),
    "closed at once": (b"", "the connection broke"),
    "HTML with 200": ((200, {"Content-Type": "text/html"}, b"<html>login</html>"), "not JSON but text/html: '<html>"),
    "broken JSON": ((200, {"Content-Type": "application/json"}, b'{"choices": ['), "not JSON but application/json"),
    "a list": (as_json(200, []), "an error with status 200"),
    "an error with 200": (error(200, "upstream is gone"), "an error with status 200: upstream is gone"),
    "no choices": (as_json(200, {"choices": []}), "no choice in the answer"),
    "no message": (as_json(200, {"choices": [{"finish_reason": "stop"}]}), "no choice in the answer"),
    "no finish": (answer("half", None), "finish_reason is null: the answer is not whole"),
    "a strange finish": (answer("half", "abort"), 'finish_reason is "abort"'),
    "content in parts": (answer([{"type": "text"}]), "content is list, not text"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_tried_again_and_never_taken_for_an_answer(server: Server, tmp_path: Path, name: str) -> None:
    reply, says = PASSING[name]
    server.script = lambda number, body: reply if number < 2 else None
    report = Lines()
    metrics, found = ask(server, tmp_path / "passes", report=report)
    assert found == {0: Candidate("Fine.", None, "stop")}
    assert (metrics["requests"], metrics["retries"]) == (3, 2)
    assert len(report.lines) == 1, "the same trouble is told once"
    assert says in report.lines[0]
    server.script = lambda number, body: reply
    stopped = fails(server, tmp_path / "stays")
    assert isinstance(stopped, EndpointError)
    assert "no answer for train.jsonl: row 1 after 3 tries" in stopped.message
    assert says in stopped.message
    assert "run again" in str(stopped.hint)


def test_an_answer_that_takes_too_long_is_given_up_even_while_bytes_trickle_in(server: Server, tmp_path: Path) -> None:
    def hang(number: int, body: Body) -> None:
        server.end.wait(30)

    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n"
    for script in (hang, lambda number, body: [head, *[b" "] * 8000]):
        server.script = script
        stopped = fails(server, tmp_path, timeout_s=0.2, retries=1)
        assert "no whole answer within timeout_s = 0.2" in stopped.message
    assert len(server.requests) == 4


def test_a_server_that_is_not_there_is_said(server: Server, tmp_path: Path) -> None:
    stopped = fails(server, tmp_path, url="http://127.0.0.1:9/v1", retries=1)
    assert "http://127.0.0.1:9/v1: no answer for train.jsonl: row 1 after 2 tries: cannot connect" in stopped.message
    assert "is the server running?" in stopped.message


@pytest.mark.parametrize(
    ("reply", "kind", "says", "hint"),
    [
        (error(401, f"Incorrect API key: {KEY}"), EndpointError, "refuses the key in OPENAI_API_KEY", "OPENAI_API_KEY"),
        (error(403, "no access"), EndpointError, "(403: no access)", "OPENAI_API_KEY"),
        (error(404, "The model `m` does not exist"), EndpointError, "no model 'm'", "one of: one, two"),
        (error(429, "insufficient_quota: pay first"), EndpointError, "nothing left to spend", "is kept"),
        (
            error(400, "This model's maximum context length is 64 tokens"),
            DataError,
            "train.jsonl: row 1: too long for the model",
            "larger context",
        ),
        (error(400, "unknown field 'seed'"), EndpointError, "refuses the request (400: unknown field", "kept"),
        (error(422, "bad"), EndpointError, "refuses the request (422: bad)", "kept"),
        ((301, {"Location": "https://elsewhere/v1"}, b""), EndpointError, "redirects to https://elsewhere/v1", "url"),
        (as_json(400, {"detail": "plain text"}), EndpointError, "400: plain text", "kept"),
        (as_json(400, [1]), EndpointError, "400: [1]", "kept"),
    ],
)
def test_what_does_not_pass_is_asked_once_and_explained(
    server: Server, tmp_path: Path, reply: Reply, kind: type[ToolchainError], says: str, hint: str
) -> None:
    server.script = lambda number, body: reply
    stopped = fails(server, tmp_path, 5)
    assert type(stopped) is kind
    assert says in stopped.message
    assert hint in str(stopped.hint)
    assert len(server.requests) == 1


def test_an_address_without_the_interface_is_told_from_an_unknown_model(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: (404, {"Content-Type": "text/html"}, b"<html>nothing here</html>")
    server.models = (404, {"Content-Type": "text/html"}, b"<html>nothing here</html>")
    stopped = fails(server, tmp_path)
    assert "no /chat/completions there" in stopped.message
    assert "up to and with the version" in str(stopped.hint)


# --- The key.


def test_the_key_goes_into_a_header_and_nowhere_else(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: error(500, f"you sent {KEY}") if number == 0 else None
    report = Lines()
    metrics, _ = ask(server, tmp_path, 2, report=report)
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 3
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "you sent [key]" in report.lines[0]
    for text in (written, json.dumps(metrics), *report.lines, *map(json.dumps, server.requests)):
        assert KEY not in text


def test_without_a_key_none_is_sent_and_a_refusal_names_the_variable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(server, tmp_path / "open")
    assert "Authorization" not in server.headers[0]
    server.script = lambda number, body: error(401, "who are you?")
    stopped = fails(server, tmp_path / "closed")
    assert "refuses a request without a key (401: who are you?)" in stopped.message
    assert "OPENAI_API_KEY" in str(stopped.hint)


@pytest.mark.parametrize("key", ["sk-ключ", "sk-one\nsk-two", "sk-\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    stopped = fails(server, tmp_path, key_variable="MY_KEY")
    assert "the key in MY_KEY has characters" in stopped.message
    assert "sk-" not in stopped.message + str(stopped.hint)
    assert not server.requests


# --- Pace, cost, resume.


def test_a_wait_that_the_server_asks_for_holds_for_every_request(server: Server, tmp_path: Path) -> None:
    times: list[float] = []

    def script(number: int, body: Body) -> Reply | None:
        times.append(time.monotonic())
        return error(429, "slow down", **{"Retry-After": "0.3"}) if number == 0 else None

    server.script = script
    ask(server, tmp_path, 4)
    assert all(later - times[0] >= 0.29 for later in times[1:])


def test_a_wait_of_hours_stops_the_run_instead(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: error(429, "daily limit", **{"Retry-After": "7200"})
    stopped = fails(server, tmp_path)
    assert "429: daily limit; it asks to wait 7200 s" in stopped.message
    assert len(server.requests) == 1


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert client.retry_after_s({"retry-after": "7"}, now_s=0) == 7
    assert client.retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now_s=40) == 60
    assert client.retry_after_s({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now_s=400) == 0
    assert client.retry_after_s({"retry-after": "soon"}, now_s=0) is None
    assert client.retry_after_s({}, now_s=0) is None


def test_the_pace_spreads_requests_over_the_minute_and_takes_estimates_back() -> None:
    pace = client.Pace(60)
    assert [pace.take(1, now_s=100.0) for _ in range(3)] == [0.0, 1.0, 2.0]
    assert pace.take(1, now_s=110.0) == 0.0
    tokens = client.Pace(6000)
    assert tokens.take(600, now_s=0.0) == 0.0
    tokens.settle(100 - 600)
    assert tokens.take(600, now_s=0.0) == pytest.approx(1.0)
    assert client.Pace(None).take(10**9, now_s=5.0) == 0.0


def test_a_cost_limit_stops_before_the_next_question_and_keeps_what_was_paid_for(
    server: Server, tmp_path: Path
) -> None:
    prices: dict[str, Any] = {"input_price": 1e5, "output_price": 2e5}  # an answer costs 10 × 0.1 + 5 × 0.2 = 2
    stopped = fails(server, tmp_path, 10, max_cost=5.0, **prices)
    assert "3 answers have cost 6: teacher.endpoint.max_cost is 5" in stopped.message
    assert "raise max_cost and run again" in str(stopped.hint)
    assert len(server.requests) == 3
    again = fails(server, tmp_path, 10, max_cost=5.0, **prices)
    assert "3 answers have cost 6" in again.message
    assert len(server.requests) == 3, "what earlier runs cost counts"
    metrics, found = ask(server, tmp_path, 10, max_cost=100.0, **prices)
    assert (len(found), metrics["answers_resumed"], len(server.requests)) == (10, 3, 10)
    assert metrics["cost"] == pytest.approx(20)


def test_a_try_that_was_paid_for_in_vain_counts(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: answer("half", None) if number == 0 else None
    metrics, _ = ask(server, tmp_path, input_price=1e5, output_price=2e5)
    assert metrics["cost"] == pytest.approx(4)
    assert metrics["answer_tokens"] == 10


def test_a_cost_limit_needs_the_server_to_count_tokens(server: Server, tmp_path: Path) -> None:
    server.script = lambda number, body: answer(usage=None)
    stopped = fails(server, tmp_path, 3, max_cost=5.0, input_price=1.0, output_price=1.0)
    assert "max_cost cannot be kept to" in stopped.message
    metrics, _ = ask(server, tmp_path / "free", 3)
    assert (metrics["prompt_tokens"], metrics["cost"]) == (None, None)


def test_answers_under_way_are_saved_when_another_request_fails(server: Server, tmp_path: Path) -> None:
    refused = threading.Event()

    def script(number: int, body: Body) -> Reply | None:
        if body["messages"][0]["content"] == "Question 3?":
            return error(401, "expired")
        refused.wait(0.3)
        return None

    server.script = script
    fails(server, tmp_path, 20, concurrency=4)
    with Journal(tmp_path / "resume" / "answers.jsonl") as journal:
        assert sorted(journal.answers) == [0, 1, 2]
    assert len(server.requests) == 4


def test_a_resumed_run_asks_only_what_is_missing_and_mends_a_line_cut_short(server: Server, tmp_path: Path) -> None:
    ask(server, tmp_path, 5)
    path = tmp_path / "resume" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:9])
    server.requests.clear()
    metrics, found = ask(server, tmp_path, 5)
    assert server.asked() == ["Question 3?", "Question 4?"]
    assert metrics["answers_resumed"] == 3
    assert len(found) == 5
    assert len(path.read_bytes().splitlines()) == 5
    server.requests.clear()
    ask(server, tmp_path, 5)
    assert not server.requests


def test_a_damaged_line_in_the_middle_of_the_journal_is_named(server: Server, tmp_path: Path) -> None:
    ask(server, tmp_path, 3)
    path = tmp_path / "resume" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"answers": {"1": {"text": 5}}}\n' + lines[2])
    assert "answers.jsonl: line 2 is damaged" in fails(server, tmp_path, 3).message


def test_a_full_disk_stops_the_run_and_leaves_no_half_line_in_the_middle(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = Journal.add, 0

    def add(self: Journal, answers: Any, **facts: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            self._file.close()
            with (tmp_path / "resume" / "answers.jsonl").open("a") as file:
                file.write('{"answers": {"2"')
            self._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115 - the journal closes it
        real(self, answers, **facts)

    monkeypatch.setattr(Journal, "add", add)
    with pytest.raises(OSError, match="No space left on device"):
        ask(server, tmp_path, 9, concurrency=3)
    monkeypatch.setattr(Journal, "add", real)
    metrics, found = ask(server, tmp_path, 9)
    assert (metrics["answers_resumed"], len(found)) == (2, 9)


_KILLED = """
import sys
from pathlib import Path
from tests.unit.test_endpoint import prompts
from toolchain.recipe import Endpoint, Generate
from toolchain.reporter import Silent
from toolchain.teacher import endpoint
from toolchain.teacher.journal import Journal
with Journal(Path(sys.argv[2]) / "resume" / "answers.jsonl") as journal:
    asked = Endpoint(url=sys.argv[1], model="m", concurrency=2)
    endpoint.answer(Generate(), prompts(8), endpoint=asked, journal=journal, report=Silent())
"""


def test_after_a_kill_only_the_unanswered_questions_are_asked(server: Server, tmp_path: Path) -> None:
    reached = threading.Event()

    def script(number: int, body: Body) -> None:
        if number >= 4:
            reached.set()
            server.end.wait(30)

    server.script = script
    argv = [sys.executable, "-c", _KILLED, server.url, str(tmp_path)]
    with subprocess.Popen(argv, env={**os.environ, "OMP_NUM_THREADS": "1"}) as child:
        assert reached.wait(60)
        journal = tmp_path / "resume" / "answers.jsonl"
        while len(journal.read_bytes().splitlines()) < 4:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    server.script = lambda number, body: None
    before = len(server.requests)
    metrics, found = ask(server, tmp_path, 8)
    assert (metrics["answers_resumed"], len(server.requests) - before, len(found)) == (4, 4, 8)


def test_the_proxy_of_the_environment_is_used(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    _, found = ask(server, tmp_path, url="http://teacher.invalid/v1")
    assert len(found) == 1
    assert server.headers[0]["Host"] == "teacher.invalid"


def test_half_a_surrogate_pair_in_an_answer_does_not_break_the_file(server: Server, tmp_path: Path) -> None:
    reply = answer("x")
    server.script = lambda number, body: (reply[0], reply[1], reply[2].replace(b'"x"', b'"a\\ud800b"'))
    _, found = ask(server, tmp_path)
    assert found[0].text == "a?b"
