"""Chromium without a window, driven over chromedriver's WebDriver protocol: HTTP and JSON, so no package is needed."""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolchain.device import serve

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""Key of an element's reference, by the standard: https://www.w3.org/TR/webdriver2/#elements"""
ENTER, ESCAPE, SHIFT, TAB, CONTROL = "\ue007", "\ue00c", "\ue008", "\ue004", "\ue009"
_WAIT_S = 180.0
"""Far above what anything takes, for a busy machine."""


class Browser:
    """One window."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Body of a function → what it returns, or what its promise comes to."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def type(self, selector: str, text: str) -> None:
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys one after the other, for whatever has the focus; all are held until the end."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in keys]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def click(self, selector: str) -> None:
        """As a user would: fails where it is hidden or covered."""
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def text(self, selector: str) -> str:
        """What is to be read there."""
        return str(self._call("GET", f"/element/{self._find(selector)}/text"))

    def shown(self, selector: str) -> bool:
        return bool(self.run("return document.querySelector(arguments[0])?.checkVisibility() ?? false", selector))

    def wait(self, condition: str, *arguments: object) -> Any:
        """Until an expression is true. Fails with the page's text when that takes too long."""
        end_s = time.monotonic() + _WAIT_S
        while not (found := self.run(f"return {condition}", *arguments)):
            assert time.monotonic() < end_s, f"{condition} {arguments}: {self.text('body')[-2000:]}"
            time.sleep(0.02)
        return found

    def requests(self) -> list[str]:
        """Every address that was asked for since the last call, whether it was let through or not."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def console(self) -> list[str]:
        """Errors, warnings and violations of the policy since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def emulate(self, command: str, **parameters: object) -> None:
        """A command of the DevTools protocol, such as for another screen."""
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def picture(self) -> bytes:
        """PNG of the window's content, in base 64."""
        return str(self._call("GET", "/screenshot")).encode()

    def close(self) -> None:
        self._call("DELETE", "")

    def _log(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("POST", "/se/log", {"type": kind})
        return found

    def _find(self, selector: str) -> str:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return str(found[_ELEMENT])

    def _call(self, method: str, path: str, body: object = None) -> Any:
        return _ask(method, self._url + path, body)


def _ask(method: str, url: str, body: object) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_WAIT_S) as response:
            return json.loads(response.read())["value"]
    except urllib.error.HTTPError as error:
        with error:
            value = json.loads(error.read())["value"]
        raise AssertionError(f"{method} {url}: {value['error']}: {value['message'][:2000]}") from None


def missing() -> str | None:
    """What is to be installed, where there is no browser."""
    found = all(shutil.which(name) for name in ("chromium", "chromedriver"))
    return None if found else "no Chromium with its driver: apt-get install chromium chromium-driver"


@contextmanager
def started(width: int = 1100, height: int = 800, *more: str) -> Iterator[Browser]:
    """A browser of its own profile, with `more` options."""
    port = serve.free_port()
    arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}", *more]
    with tempfile.TemporaryDirectory() as profile, Path(profile, "driver.log").open("w") as log:
        argv = ["chromedriver", f"--port={port}", "--allowed-ips=127.0.0.1"]
        with subprocess.Popen(argv, stdout=log, stderr=log) as driver:
            try:
                _wait_ready(f"http://127.0.0.1:{port}/status")
                options = {"args": [*arguments, f"--user-data-dir={profile}/chromium"]}
                wanted = {
                    "goog:chromeOptions": options,
                    "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
                }
                session = _ask("POST", f"http://127.0.0.1:{port}/session", {"capabilities": {"alwaysMatch": wanted}})
                browser = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
                try:
                    browser.open("about:blank")
                    browser.requests()  # those of the page that a new window shows
                    yield browser
                finally:
                    browser.close()
            finally:
                driver.terminate()


def _wait_ready(url: str) -> None:
    end_s = time.monotonic() + _WAIT_S
    while True:
        try:
            if _ask("GET", url, None)["ready"]:
                return
        except OSError:
            assert time.monotonic() < end_s, "chromedriver does not answer"
        time.sleep(0.05)
