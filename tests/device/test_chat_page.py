"""The chat page in a real browser, of real bundles that edgectl serves."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.device import browser as chromium
from tests.device import bundles, tiny_chat
from tests.device.browser import CONTROL, ENTER, ESCAPE, SHIFT, TAB, Browser
from tests.device.test_bundle_served import serving
from toolchain.device import files, serve
from toolchain.target import read_target

pytestmark = [pytest.mark.device, pytest.mark.llama_cpp]
_PAGE = Path(serve.__file__).with_name("web") / "index.html"
_SYSTEM = "Be brief.\nSprich Deutsch: äöü."
_HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
_IDLE = "running === null"
_Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> _Make:
    """Builds a bundle around a tiny model."""
    llama = bundles.x86_llama()
    return lambda **more: bundles.around(llama, read_target("x86-cpu"), tmp_path_factory.mktemp("made"), **more)


@pytest.fixture(scope="module")
def bundle(make: _Make) -> Path:
    return make(system=_SYSTEM)


@pytest.fixture(scope="module")
def endless(make: _Make) -> Path:
    """Its answers go on for tens of thousands of tokens, seconds at the least."""
    return make(eos="<|other|>", context=65536)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    if missing := chromium.missing():
        pytest.skip(missing)
    with chromium.started() as browser:
        yield browser


@pytest.fixture
def page(window: Browser) -> Iterator[Browser]:
    """The window; whatever a test did in it, nothing was asked of anybody but the server and no policy was hurt."""
    window.requests(), window.console()
    yield window
    origin = window.run("return location.origin")
    asked = [url for url in window.requests() if not url.startswith("data:")]
    assert [url for url in asked if not url.startswith(origin + "/")] == []
    assert [line for line in window.console() if "Content Security Policy" in line] == []
    assert origin + "/v1/models" in asked
    window.open("about:blank")


def visit(page: Browser, port: int) -> None:
    page.open(f"http://127.0.0.1:{port}/")
    page.wait("document.getElementById('model').textContent === 'tiny' && !connecting")


def ask(page: Browser, question: str) -> str:
    """The answer as it is to be read."""
    page.type("#question", question + ENTER)
    page.wait(_IDLE)
    return page.text("article:last-child .body")


def facts(page: Browser) -> str:
    return page.text("article:last-child .about")


def test_the_policy_allows_this_style_and_this_script_alone() -> None:
    text = _PAGE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; connect-src 'self'; img-src data:;")
    assert "unsafe" not in policy
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bon\w+=", text)


def test_the_bundle_lists_the_page_and_the_server_shows_nothing_else_without_the_key(
    bundle: Path, tmp_path: Path
) -> None:
    listed = files.open_bundle(bundle).manifest["files"]
    assert listed["web/index.html"]["sha256"] == files.sha256(_PAGE)
    assert [path for path in listed if path.startswith("web/")] == ["web/index.html", "web/system.txt"]
    key = tmp_path / "key"
    key.write_text("open sesame\n")
    with serving(bundle, "--api-key-file", str(key)) as (_, port):

        def status(path: str) -> int:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
                    return int(response.status)
            except urllib.error.HTTPError as error:
                error.close()
                return error.code

        paths = ("/", "/health", "/index.html", "/system.txt", "/props", "/v1/models", "/presets.json", "/web/")
        assert [status(path) for path in paths] == [200, 200, 401, 401, 401, 401, 401, 401]
    with serving(bundle) as (_, port):
        assert [status(path) for path in ("/", "/system.txt", "/../presets.json", "/..%2fpresets.json")] == [
            200,
            200,
            404,
            404,
        ]


def test_a_question_is_answered_again_and_forgotten(bundle: Path, page: Browser) -> None:
    with serving(bundle) as (_, port):
        visit(page, port)
        assert page.text("#context") == f"context of {tiny_chat.CONTEXT} tokens"
        assert ask(page, "How are you?") == tiny_chat.ANSWER
        said = facts(page)
        assert re.match(r"5 tokens · [\d.]+ tokens/s · first token after \d+ ms · context: \d+ of 1024\s+Copy", said)
        # The message that the model was trained with is told to it.
        sent = json.loads(page.run("return request()"))
        assert sent["messages"] == [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": "How are you?"},
            {"role": "assistant", "content": tiny_chat.ANSWER},
        ]
        assert {"temperature", "max_tokens"}.isdisjoint(sent)
        page.click(".again")
        page.wait(_IDLE)
        assert len(page.run("return turns")) == 2
        assert ask(page, "And now?") == tiny_chat.ANSWER
        assert page.run("return turns.length + document.querySelectorAll('article').length") == 8
        assert (
            page.run("return [...document.querySelectorAll('.again')].filter((b) => b.checkVisibility()).length") == 1
        )
        page.click("#fresh")
        assert page.run("return turns.length + document.querySelectorAll('article').length") == 0


def test_the_settings_go_into_the_request_and_wrong_ones_are_not_sent(bundle: Path, page: Browser) -> None:
    with serving(bundle) as (_, port):
        visit(page, port)
        page.click("#options")
        page.type("#temperature", "0")
        page.type("#max_tokens", "2")
        page.run("document.getElementById('system').value = ''")
        assert ask(page, "?") == tiny_chat.ANSWER[:2]
        assert facts(page).startswith("cut off: max tokens")
        sent = json.loads(page.run("return request()"))
        assert (sent["temperature"], sent["max_tokens"], sent["messages"][0]["role"]) == (0, 2, "user")
        page.type("#max_tokens", ".5")
        page.click("#options")
        page.type("#question", "again" + ENTER)
        assert page.shown("#max_tokens")
        assert len(page.run("return turns")) == 2


def test_an_answer_of_markup_is_shown_as_text(make: _Make, page: Browser) -> None:
    pieces = ["a", _HOSTILE, "\n```html\n<b>", "</b>\n```\n", "日本 👍"]
    with serving(make(answer=pieces)) as (_, port):
        visit(page, port)
        assert ask(page, _HOSTILE) == f"a{_HOSTILE}\n<b></b>\n日本 👍"
        assert page.text("article:last-child pre") == "<b></b>"
        assert page.run("return [...document.querySelectorAll('#chat *')].map((e) => e.tagName)") == [
            *("ARTICLE", "ARTICLE", "DETAILS", "SUMMARY", "DIV"),
            *("DIV", "DIV", "PRE", "DIV", "DIV", "SPAN", "BUTTON", "BUTTON"),
        ]
        assert page.run("return turns[1].content") == "".join(pieces)
        assert page.run("return document.title") == "tiny"
        # With the browser's clipboard, and as over plain HTTP from another machine, where there is none.
        for prepare in ("", "Object.defineProperty(navigator, 'clipboard', { value: undefined })"):
            page.run(prepare)
            page.run("document.querySelector('.copy').textContent = document.getElementById('question').value = ''")
            page.run("document.querySelector('.copy').focus()")
            page.press(ENTER)
            page.wait("document.querySelector('.copy').textContent === 'Copied'")
            assert page.run("return document.activeElement.className") == "copy"
            page.click("#question")
            page.press(CONTROL, "v")
            assert page.run("return document.getElementById('question').value") == "".join(pieces)


def test_the_policy_stops_what_would_leave_the_origin(bundle: Path, window: Browser) -> None:
    """What the check after each test looks for is there when it should be."""
    with serving(bundle) as (_, port), serving(bundle) as (_, other):
        visit(window, port)
        window.console()
        stopped = "return fetch(`http://127.0.0.1:${arguments[0]}/health`).then(() => 'sent', () => 'stopped')"
        assert window.run(stopped, other) == "stopped"
        assert any("Content Security Policy" in line for line in window.console())
        put_in = "try { document.body.innerHTML = arguments[0]; return 'put in' } catch (e) { return e.name }"
        assert window.run(put_in, "<b>x</b>") == "TypeError"
        window.console()


def test_stop_ends_the_answer_on_the_server_as_well(endless: Path, page: Browser) -> None:
    with serving(endless) as (_, port):
        visit(page, port)
        for stop in ("button", "key"):
            page.type("#question", "?" + ENTER)
            page.wait("document.querySelector('article:last-child .body').textContent.length > 50")
            page.click("#stop") if stop == "button" else page.press(ESCAPE)
            page.wait(_IDLE)
            assert facts(page).startswith("stopped")
            assert re.search(r"stopped\s+[1-9]\d* tokens · [\d.]+ tokens/s", facts(page))
            _wait_for(lambda: _busy(port) == 0)
        assert [turn["role"] for turn in page.run("return turns")] == ["user", "assistant"] * 2
        page.type("#question", "?" + ENTER)
        page.wait("document.querySelector('article:last-child .body').textContent.length > 50")
        assert _busy(port) == 1
        page.click("#fresh")
        _wait_for(lambda: _busy(port) == 0)
        assert page.run("return turns") == []


def _busy(port: int) -> int:
    """Answers that the server is writing."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        (found,) = re.findall(r"^llamacpp:requests_processing (\d+)", response.read().decode(), re.MULTILINE)
    return int(found)


def _wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_the_key_is_asked_for_refused_and_taken(bundle: Path, page: Browser, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("open sesame\n", encoding="utf-8")
    with serving(bundle, "--api-key-file", str(key)) as (_, port):
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.activeElement.id === 'key'")
        assert page.text("#notice") == "The server asks for a key: the one it was started with."
        page.type("#key", "wrong" + ENTER)
        page.wait(
            "document.getElementById('notice').textContent === arguments[0]", "The server does not accept this key."
        )
        page.type("#question", "How are you?" + ENTER)
        page.wait(_IDLE)
        assert facts(page).startswith("The server asks for a key.")
        page.type("#key", "open sesame" + ENTER)
        page.wait("!document.getElementById('access').checkVisibility() && turns.length === 2 && running === null")
        assert page.text("article:last-child .body") == tiny_chat.ANSWER
        assert page.text("#notice") == ""
        assert page.run("return [localStorage.length, document.cookie, location.href]") == [
            *(0, "", f"http://127.0.0.1:{port}/")
        ]
        # Another load in the same tab has it still.
        visit(page, port)
        assert ask(page, "And now?") == tiny_chat.ANSWER


def test_events_may_be_cut_anywhere(bundle: Path, page: Browser) -> None:
    sent = ': ping\n\ndata: {"a":"é"}\r\n\r\ndata:日本 👍\ndata: two\n\nevent: x\ndata: [DONE]\n\ndata: unfinished'
    script = """
        const bytes = new TextEncoder().encode(arguments[0]), all = [];
        const read = async (chunks) => {
          const stream = new ReadableStream({ start(to) { chunks.forEach((c) => to.enqueue(c)); to.close(); } });
          const found = [];
          for await (const data of events(stream)) found.push(data);
          return found;
        };
        for (let cut = 0; cut <= bytes.length; cut++) all.push(await read([bytes.slice(0, cut), bytes.slice(cut)]));
        all.push(await read([...bytes].map((byte) => Uint8Array.of(byte))));
        return all;"""
    with serving(bundle) as (_, port):
        visit(page, port)
        found = page.run(f"return (async () => {{ {script} }})()".replace("arguments[0]", json.dumps(sent)))
    assert len(found) == len(sent.encode()) + 2
    assert all(events == ['{"a":"é"}', "日本 👍\ntwo", "[DONE]"] for events in found)


def test_code_is_told_from_text(bundle: Path, page: Browser) -> None:
    cases = {
        "a\n\n```py\nx = 1\n\ny\n```\n\nb": [[False, "a"], [True, "x = 1\n\ny"], [False, "b"]],
        "```\nnot closed": [[True, "not closed"]],
        "````\n```\n````": [[True, "```"]],
        "~~~\na\n```\n~~~": [[True, "a\n```"]],
        "say ```x``` or ``` y": [[False, "say ```x``` or ``` y"]],
        "  indented\n": [[False, "  indented"]],
        "": [],
    }
    with serving(bundle) as (_, port):
        visit(page, port)
        for text, expected in cases.items():
            assert page.run("return blocks(arguments[0]).map(({code, text}) => [code, text])", text) == expected


def test_thoughts_are_folded_away(make: _Make, page: Browser) -> None:
    template = tiny_chat.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ message['content'] }}",
    )
    pieces = ["<think>\n", "Hm", "\n</think>\n\n", *tiny_chat.ANSWER[1:]]
    with serving(make(answer=pieces, template=template)) as (_, port):
        visit(page, port)
        assert ask(page, "?") == tiny_chat.ANSWER[1:]
        assert page.run("return turns[1].content") == tiny_chat.ANSWER[1:]
        assert not page.shown("details .text")
        page.click("summary")
        assert page.text("details .text") == "Hm"


def test_a_page_that_the_browser_kept_from_an_older_release_says_so(
    bundle: Path, page: Browser, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(bundle, older)
    # As tar unpacks it; a browser keeps for long what was changed long ago.
    os.utime(older / "web" / "index.html", (0, 0))
    with serving(older) as (_, port):
        visit(page, port)
        page.wait("performance.getEntriesByType('resource').some((fetched) => fetched.name === location.href)")
        (older / "web" / "index.html").write_text(_PAGE.read_text().replace("default-src", "default-src  "))
        page.open("about:blank")
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.getElementById('notice').textContent.endsWith('reload it.')")
        assert not page.run("return POLICY.startsWith('default-src  ')")
        page.run("location.reload()")
        page.wait("performance.getEntriesByType('resource').some((fetched) => fetched.name === location.href)")
        assert page.run("return POLICY.startsWith('default-src  ')")
        assert page.text("#notice") == ""


def test_a_conversation_beyond_the_context_is_named(bundle: Path, page: Browser) -> None:
    with serving(bundle) as (_, port):
        visit(page, port)
        ask(page, "x" * tiny_chat.CONTEXT)
        assert re.match(
            r"The conversation has 1\d\d\d tokens, more than the context of 1024 holds: start a new chat\.", facts(page)
        )


def test_an_answer_that_fills_the_context_is_said_to_be_cut_off(make: _Make, page: Browser) -> None:
    with serving(make(eos="<|other|>", context=256)) as (_, port):
        visit(page, port)
        assert len(ask(page, "?")) > 128
        assert facts(page).startswith("cut off: the context is full")


def test_the_page_says_that_the_server_is_gone_or_starting_and_goes_on_by_itself(
    endless: Path, page: Browser, tmp_path: Path
) -> None:
    notice = "document.getElementById('notice').textContent.startsWith(arguments[0])"
    with serving(endless) as (child, port):
        visit(page, port)
        page.type("#question", "?" + ENTER)
        page.wait("document.querySelector('article:last-child .body').textContent.length > 50")
        child.kill()
        page.wait(_IDLE)
    assert facts(page).startswith("The server went away in the middle of the answer.")
    page.wait(notice, "The server does not answer.")
    # A server that waits for its model for ever: nobody writes to that file.
    os.mkfifo(tmp_path / "model.gguf")
    argv = [str(endless / "runtime/bin/llama-server"), "--model", str(tmp_path / "model.gguf")]
    argv += ["--port", str(port), "--path", str(endless / "web")]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as loading:
        try:
            page.wait(notice, "The server is starting")
            page.click("#options")
            page.type("#max_tokens", "3")
            page.type("#question", "Are you there?" + ENTER)
            assert page.shown("#stop")
        finally:
            loading.send_signal(signal.SIGKILL)
    page.wait(_IDLE)
    with serving(endless, "--port", str(port)):
        page.wait("document.getElementById('notice').textContent === ''")
        page.click("article:last-child .again")
        page.wait(_IDLE)
        assert len(page.text("article:last-child .body")) == 3


def test_it_is_used_by_the_keyboard_alone(bundle: Path, page: Browser) -> None:
    with serving(bundle) as (_, port):
        visit(page, port)
        assert page.run("return document.activeElement.id") == "question"
        page.press("a")
        page.press(SHIFT, ENTER)
        page.press("b")
        assert page.run("return document.getElementById('question').value") == "a\nb"
        page.press(ENTER)
        page.wait(f"{_IDLE} && turns.length === 2")
        assert page.run("return turns[0].content") == "a\nb"
        reached = []
        for _ in range(8):
            page.press(TAB)
            reached.append(page.run("return document.activeElement.id || document.activeElement.className"))
            seen = page.run("return getComputedStyle(document.activeElement).outlineStyle")
            assert seen == "solid" or reached[-1] == ""
        assert {"send", "options", "fresh", "chat", "copy", "again", "question"} <= set(reached)
        unnamed = """return [...document.querySelectorAll('input, textarea, button')].filter(
            (e) => !(e.labels?.length && e.labels[0].textContent.trim()) && !e.textContent.trim()).map((e) => e.id)"""
        assert page.run(unnamed) == []


def test_it_fits_a_phone_and_the_dark(bundle: Path, page: Browser) -> None:
    with serving(bundle) as (_, port):
        page.emulate("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        try:
            visit(page, port)
            page.click("#options")
            ask(page, "x" * 300)
            assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
            places = "return ['header', '#settings', '#chat', 'footer'].map((n) => document.querySelector(n)).flatMap("
            edges = page.run(places + "(e) => [e.getBoundingClientRect().top, e.getBoundingClientRect().bottom])")
            assert [round(edge) for edge in edges] == [round(edge) for edge in sorted(edges)]
            assert round(edges[4]) < round(edges[5])
            assert round(edges[-1]) == 640
            assert edges[1] - edges[0] < 70
            colours = "return ['color', 'backgroundColor'].map((n) => getComputedStyle(document.body)[n])"
            light = page.run(colours)
            dark = {"name": "prefers-color-scheme", "value": "dark"}
            page.emulate("Emulation.setEmulatedMedia", features=[dark])
            assert set(page.run(colours)).isdisjoint(light)
        finally:
            page.emulate("Emulation.clearDeviceMetricsOverride")
            page.emulate("Emulation.setEmulatedMedia", features=[])
