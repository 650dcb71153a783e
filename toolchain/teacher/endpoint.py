"""Prompts → answers by an OpenAI-compatible server: POST {url}/chat/completions, one request per answer.

Answers are asked for whole, not as a stream: a connection that breaks leaves no half answer that could pass for a short
one. Each answer is in the journal before its place is given to the next. The key is read from the environment and
appears in a request header only.
"""

import asyncio
import collections
import email.utils
import json
import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from toolchain.data.answers import Candidate
from toolchain.data.rows import Finish
from toolchain.errors import DataError, EndpointError, HostError
from toolchain.recipe import Endpoint, Generate
from toolchain.reporter import Reporter, Task, bar
from toolchain.teacher.journal import Journal, Prompt, speed

_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_LONGEST_RETRY_AFTER_S = 900.0
_PASSING = (408, 409, 425, 429)
_FINISHES: dict[str, Finish] = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    "length": "length",
}
_WITHOUT_TEXT = ("content_filter", "tool_calls", "function_call")
_TOO_LONG = re.compile(r"context|too long|too many tokens|exceed", re.IGNORECASE)
_KEPT = "what was answered is kept: run again to ask the rest"

Usage = tuple[int, int]
"""Tokens of the prompt and of the answer, as the server counted them."""


class _PassingError(Exception):
    """A try that failed in a way that may pass."""

    def __init__(self, what: str, *, wait_s: float | None = None, usage: Usage | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s
        self.usage = usage


class _OtherLimitKeyError(Exception):
    """The server wants the answer's limit as max_completion_tokens (OpenAI's reasoning models)."""


@dataclass(frozen=True)
class _Reply:
    candidate: Candidate
    usage: Usage | None
    note: str | None
    """Why there is no text, where there is none."""
    model: str | None


class Pace:
    """At most `per_minute` units a minute, spread evenly; None is no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._free_at_s = 0.0

    def take(self, amount: float, *, now_s: float) -> float:
        """Book `amount`; returns the seconds to wait before it may be used."""
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + amount * self._gap_s
        return start_s - now_s

    def settle(self, more: float) -> None:
        """Correct what was booked by an estimate."""
        self._free_at_s += more * self._gap_s


def answer(
    settings: Generate, prompts: Sequence[Prompt], *, endpoint: Endpoint, journal: Journal, report: Reporter
) -> dict[str, Any]:
    """Ask what the journal lacks. Raises EndpointError; DataError for a row too long for the server's model."""
    with bar(report, f"answers of {endpoint.model}", total=len(prompts), unit="answer") as task:
        resumed = len(journal.answers)
        task.advance(resumed)
        client = _Client(settings, endpoint, journal, report, task)
        started = time.perf_counter()
        asyncio.run(client.ask_all([prompt for prompt in prompts if prompt.number not in journal.answers]))
        seconds = time.perf_counter() - started
    usage = [entry["usage"] for entry in journal.facts if entry.get("usage")]
    notes = collections.Counter(entry["note"] for entry in journal.facts if entry.get("note"))
    return {
        "engine": "endpoint",
        "model": endpoint.model,
        "served_model": client.served,
        **speed(answers=len(prompts) - resumed, tokens=client.tokens, seconds=seconds),
        "answers_resumed": resumed,
        "requests": client.requests,
        "retries": client.retries,
        "without_text": dict(notes),
        "prompt_tokens": sum(prompt for prompt, _ in usage) if usage else None,
        "answer_tokens": sum(tokens for _, tokens in usage) if usage else None,
        "cost": client.cost,
    }


class _Client:
    """The requests of one run. Once `_failure` is set, what is under way ends and nothing more is asked."""

    def __init__(self, settings: Generate, endpoint: Endpoint, journal: Journal, report: Reporter, task: Task) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self._journal = journal
        self._report = report
        self._task = task
        self._key = _read_key(endpoint)
        self._url = endpoint.url.rstrip("/")
        self._request_pace = Pace(endpoint.requests_per_minute)
        self._token_pace = Pace(endpoint.tokens_per_minute)
        self._limit_key = "max_tokens"
        self._paused_until_s = 0.0
        self._failure: Exception | None = None
        self._stopping = asyncio.Event()
        self._said = ""
        self._usage = (0, 0)
        for entry in journal.facts:
            self._pay(tuple(entry["usage"]) if entry.get("usage") else None)
        self.requests = self.retries = self.tokens = 0
        self.served: str | None = None

    @property
    def cost(self) -> float | None:
        """Of all answers in the journal, and of tries that were paid for in vain; None without prices."""
        prices = self._endpoint.input_price, self._endpoint.output_price
        if prices[0] is None or prices[1] is None:
            return None
        return (self._usage[0] * prices[0] + self._usage[1] * prices[1]) / 1e6

    async def ask_all(self, prompts: Sequence[Prompt]) -> None:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connections = httpx.Limits(max_connections=self._endpoint.concurrency)
        todo = iter(prompts)
        try:
            # The limit per answer is set around each request: httpx's own starts again with every byte.
            http = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(None), limits=connections)
        except (ImportError, ValueError) as error:
            raise HostError(f"the proxy in the environment cannot be used: {error}", hint="see HTTPS_PROXY") from error
        async with http:
            await asyncio.gather(*(self._work(http, todo) for _ in range(self._endpoint.concurrency)))
        if self._failure is not None:
            raise self._failure

    async def _work(self, http: httpx.AsyncClient, todo: Iterator[Prompt]) -> None:
        """One of `concurrency` lines of requests."""
        try:
            while self._failure is None and (prompt := next(todo, None)) is not None:
                self._check_cost()
                await self._ask(http, prompt)
        except Exception as error:  # noqa: BLE001 - raised again by ask_all, when the answers under way are saved
            self._failure = self._failure or error
            self._stopping.set()

    def _check_cost(self) -> None:
        limit, cost = self._endpoint.max_cost, self.cost
        if limit is not None and cost is not None and cost >= limit:
            raise EndpointError(
                f"{len(self._journal.answers)} answers have cost {cost:.4g}: teacher.endpoint.max_cost is {limit:g}",
                hint="what was paid for is kept: raise max_cost and run again to ask the rest",
            )

    async def _ask(self, http: httpx.AsyncClient, prompt: Prompt) -> None:
        """One answer into the journal, after as many tries as it takes. Raises EndpointError, DataError."""
        estimate = sum(len(message.content) for message in prompt.messages) // 4 + prompt.limit
        tries = 0
        while True:
            await self._wait(self._turn(estimate))
            if self._failure is not None:
                return
            try:
                reply = await self._try(http, prompt)
            except _OtherLimitKeyError:
                self._limit_key = "max_completion_tokens"
                continue
            except _PassingError as problem:
                if problem.usage is not None:
                    self._journal.add({}, usage=problem.usage, lost=str(problem))
                    self._pay(problem.usage)
                tries += 1
                await self._after(problem, prompt, tries)
                continue
            break
        self._journal.add({prompt.number: reply.candidate}, usage=reply.usage, note=reply.note)
        self._pay(reply.usage)
        self.served = reply.model or self.served
        if reply.usage is not None:
            self.tokens += reply.usage[1]
            self._token_pace.settle(sum(reply.usage) - estimate)
        elif self._endpoint.max_cost is not None:
            raise EndpointError(
                f"{self._url}: its answers do not say how many tokens they took: max_cost cannot be kept to",
                hint="leave teacher.endpoint.max_cost out, or use a server that sends 'usage'",
            )
        self._task.advance(1)

    def _turn(self, tokens: int) -> float:
        """Seconds until the next request may leave."""
        now_s = time.monotonic()
        waits = (
            self._request_pace.take(1, now_s=now_s),
            self._token_pace.take(tokens, now_s=now_s),
            self._paused_until_s - now_s,
        )
        return max(waits)

    async def _wait(self, seconds: float) -> None:
        """Sleep, but not on after a failure elsewhere."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stopping.wait(), seconds)
            except TimeoutError:
                return

    async def _after(self, problem: _PassingError, prompt: Prompt, tries: int) -> None:
        """Wait before the next try, or raise EndpointError when there is to be none."""
        if tries > self._endpoint.retries or (problem.wait_s or 0) > _LONGEST_RETRY_AFTER_S:
            later = f"; it asks to wait {problem.wait_s:.0f} s" if problem.wait_s else ""
            raise EndpointError(
                f"{self._url}: no answer for {prompt.where} after {tries} tries: {problem}{later}", hint=_KEPT
            )
        self.retries += 1
        if problem.wait_s is not None:
            # What one request is told holds for all of them.
            self._paused_until_s = max(self._paused_until_s, time.monotonic() + problem.wait_s)
            wait_s = problem.wait_s
        else:
            # Full jitter: requests that failed together do not come back together.
            wait_s = random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(tries - 1, 30)))  # noqa: S311
        if str(problem) != self._said:
            self._said = str(problem)
            self._report.line(f"{self._url}: {problem}; trying again in {wait_s:.1f} s")
        await self._wait(wait_s)

    async def _try(self, http: httpx.AsyncClient, prompt: Prompt) -> _Reply:
        self.requests += 1
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                response = await http.post(f"{self._url}/chat/completions", json=self._body(prompt))
        except TimeoutError:
            raise _PassingError(f"no whole answer within timeout_s = {self._endpoint.timeout_s:g}") from None
        except httpx.RequestError as error:
            raise self._broken(error) from None
        if response.status_code == 404:
            raise await self._not_found(http, response)
        if response.status_code != 200:
            raise self._refused(response, prompt)
        return read_reply(response)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body = {
            "model": self._endpoint.model,
            "messages": [message.as_dict() for message in prompt.messages],
            self._limit_key: prompt.limit,
            "temperature": self._settings.sampling_temperature,
            "stream": False,
        }
        if self._settings.sampling_temperature > 0:
            body["seed"] = prompt.seed % 2**31
            if self._settings.sampling_top_p < 1:
                body["top_p"] = self._settings.sampling_top_p
        return body

    def _broken(self, error: httpx.RequestError) -> Exception:
        what = self._clean(str(error)) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in what:
            return EndpointError(f"{self._url}: {what}", hint="for a certificate of your own set SSL_CERT_FILE")
        if isinstance(error, httpx.ConnectError):
            return _PassingError(f"cannot connect: {what} (is the server running?)")
        return _PassingError(f"the connection broke: {what}")

    async def _not_found(self, http: httpx.AsyncClient, response: httpx.Response) -> EndpointError:
        """404: the model is unknown, or the address is wrong; what models there are tells which."""
        said = self._clean(message_of(response))
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                listed = (await http.get(f"{self._url}/models")).json()
            names = [str(model["id"]) for model in listed["data"]]
        except (TimeoutError, httpx.RequestError, ValueError, KeyError, TypeError):
            return EndpointError(
                f"{self._url}: no /chat/completions there (404: {said})",
                hint="teacher.endpoint.url is the address up to and with the version, such as http://localhost:8000/v1",
            )
        return EndpointError(
            f"{self._url}: no model '{self._endpoint.model}' (404: {said})",
            hint=f"teacher.endpoint.model is one of: {', '.join(names) or '(it has none)'}",
        )

    def _refused(self, response: httpx.Response, prompt: Prompt) -> Exception:
        """What an answer with another status than 200 means."""
        status, said = response.status_code, self._clean(message_of(response))
        variable = self._endpoint.key_variable
        if status in (401, 403):
            what = f"the key in {variable}" if self._key else "a request without a key"
            hint = f"put a valid key into the environment variable {variable or '… and name it: key_variable'}"
            return EndpointError(f"{self._url}: refuses {what} ({status}: {said})", hint=hint)
        if "insufficient_quota" in response.text:
            return EndpointError(f"{self._url}: nothing left to spend ({status}: {said})", hint=_KEPT)
        if status in _PASSING or status >= 500:
            return _PassingError(f"{status}: {said}", wait_s=retry_after_s(response.headers, now_s=time.time()))
        if self._limit_key == "max_tokens" and "max_completion_tokens" in response.text:
            return _OtherLimitKeyError()
        if status in (400, 413, 422) and _TOO_LONG.search(response.text):
            return DataError(
                f"{prompt.where}: too long for the model behind {self._url} ({status}: {said})",
                hint="shorten the row, lower generate.max_new_tokens, or serve the model with a larger context",
            )
        if 300 <= status < 400:
            target = self._clean(response.headers.get("location", "nowhere"))
            return EndpointError(f"{self._url}: redirects to {target}", hint="set teacher.endpoint.url to where it is")
        return EndpointError(f"{self._url}: refuses the request ({status}: {said})", hint=_KEPT)

    def _clean(self, text: str) -> str:
        """What a server said, in one line and without the key, which some repeat."""
        if self._key:
            text = text.replace(self._key, "[key]")
        return " ".join(text.split())[:300]

    def _pay(self, usage: Usage | None) -> None:
        if usage is not None:
            self._usage = (self._usage[0] + usage[0], self._usage[1] + usage[1])


def _read_key(endpoint: Endpoint) -> str:
    """The key, or "" where there is none. Raises EndpointError for one that no header can carry; it is not repeated."""
    key = os.environ.get(endpoint.key_variable, "").strip() if endpoint.key_variable else ""
    if not (key.isascii() and key.isprintable()):
        raise EndpointError(
            f"the key in {endpoint.key_variable} has characters that no header can carry",
            hint="copy it again: is it one line of plain letters?",
        )
    return key


def retry_after_s(headers: Mapping[str, str], *, now_s: float) -> float | None:
    """Seconds that a Retry-After header (RFC 9110, 10.2.3: seconds or a date) asks to wait; None without one."""
    given = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", given):
        return float(given)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - now_s)
    except ValueError:
        return None


def message_of(response: httpx.Response) -> str:
    """The message in an error body of any of the usual shapes, else the body."""
    try:
        raw = response.json()
        found = raw.get("error", raw.get("message", raw.get("detail")))
        return str(found["message"] if isinstance(found, dict) else found or response.text)
    except (ValueError, AttributeError, KeyError, RecursionError):
        return response.text or response.reason_phrase


def read_reply(response: httpx.Response) -> _Reply:
    """The answer in a response of status 200. Raises _PassingError for everything that is not a whole answer."""
    kind = response.headers.get("content-type", "no content type")
    try:
        raw = response.json()
    except (ValueError, RecursionError):
        shown = " ".join(response.text.split())[:80]
        raise _PassingError(f"not JSON but {kind}: {shown!r} (is url right, up to the version?)") from None
    if not isinstance(raw, dict) or raw.get("error"):
        raise _PassingError(f"an error with status 200: {message_of(response)[:200]}")
    usage = _usage(raw)
    choices = raw.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
        raise _PassingError("no choice in the answer", usage=usage)
    finish, text = choice.get("finish_reason"), choice["message"].get("content")
    model = raw.get("model") if isinstance(raw.get("model"), str) else None
    if finish in _WITHOUT_TEXT:
        return _Reply(Candidate("", None, "stop"), usage, str(finish), model)
    if not isinstance(finish, str) or finish not in _FINISHES:
        raise _PassingError(f"finish_reason is {json.dumps(finish)}: the answer is not whole", usage=usage)
    if text is not None and not isinstance(text, str):
        raise _PassingError(f"content is {type(text).__name__}, not text", usage=usage)
    # Half a surrogate pair, which JSON can write and UTF-8 cannot, becomes a question mark.
    text = (text or "").encode("utf-8", "replace").decode()
    note = None if text.strip() else "refusal" if choice["message"].get("refusal") else "empty"
    return _Reply(Candidate(text, None, _FINISHES[finish]), usage, note, model)


def _usage(raw: Mapping[str, Any]) -> Usage | None:
    found = raw.get("usage")
    if not isinstance(found, dict):
        return None
    counts = [found.get(key) for key in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return (int(counts[0] or 0), int(counts[1] or 0))
