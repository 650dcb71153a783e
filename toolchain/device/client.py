"""HTTP to the local llama-server: JSON requests, and streamed chat with the time of each token."""

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import DeviceError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Client:
    """Where the server is, and the key it asks for."""

    host: str
    port: int
    key: str | None = None
    timeout_s: float = 600.0

    def request(self, method: str, path: str, body: object = None, *, with_key: bool = True) -> tuple[int, Any]:
        """Status and decoded JSON body (None where there is none). Raises OSError when nobody answers."""
        connection = self._connection()
        try:
            response = self._send(connection, method, path, body, with_key=with_key)
            return response.status, _decode(response.read())
        except http.client.HTTPException as error:
            raise ConnectionError(f"the server's answer broke off: {error!r}") from error
        finally:
            connection.close()

    def post(self, path: str, body: object) -> Any:
        """JSON answer to a POST. Raises DeviceError when the status is not 200."""
        status, answer = self.request("POST", path, body)
        if status != 200:
            raise DeviceError(f"POST {path}: status {status}: {_message(answer)}")
        return answer

    def get(self, path: str) -> Any:
        """JSON answer to a GET. Raises DeviceError when the status is not 200."""
        status, answer = self.request("GET", path)
        if status != 200:
            raise DeviceError(f"GET {path}: status {status}: {_message(answer)}")
        return answer

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids that a chat request with these messages feeds to the model."""
        prompt = self.post("/apply-template", {"messages": messages})["prompt"]
        # As the chat endpoint tokenizes: it adds bos where the model asks for it, and reads special tokens.
        answer = self.post("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def chat(self, messages: Messages, **options: object) -> dict[str, Any]:
        """One whole answer: {"text", "finish", "prompt_tokens", "tokens"}. The prompt cache is not used.

        "tokens" are {"id", "top_logprobs": [{"id", "logprob"}, …]} when the options ask for `logprobs`, else none.
        """
        body = {"messages": messages, "cache_prompt": False, **options}
        answer = self.post("/v1/chat/completions", body)
        choice = answer["choices"][0]
        return {
            "text": _text(choice["message"]),
            "finish": choice["finish_reason"],
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "tokens": (choice.get("logprobs") or {}).get("content") or [],
        }

    def next_id(self, ids: Sequence[int]) -> int:
        """The likeliest token after these. The prompt cache is used: asked in order, each costs one token's time."""
        body = {"prompt": list(ids), "n_predict": 1, "temperature": 0, "seed": 0, "return_tokens": True}
        return int(self.post("/completion", {**body, "cache_prompt": True})["tokens"][0])

    def stream_chat(self, messages: Messages, **options: object) -> "Streamed":
        """One answer as it arrives. The prompt cache is not used. Raises DeviceError and OSError."""
        body = {
            "messages": messages,
            "cache_prompt": False,
            "stream": True,
            "timings_per_token": True,
            **options,
        }
        connection = self._connection()
        streamed = Streamed(sent_at_s=time.perf_counter())
        try:
            response = self._send(connection, "POST", "/v1/chat/completions", body, with_key=True)
            if response.status != 200:
                answer = _decode(response.read())
                raise DeviceError(f"POST /v1/chat/completions: status {response.status}: {_message(answer)}")
            for at_s, event in _events(_arrivals(response)):
                streamed.add(event, at_s)
        except http.client.HTTPException as error:
            raise ConnectionError(f"the server's answer broke off: {error!r}") from error
        finally:
            connection.close()
        return streamed

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object, *, with_key: bool
    ) -> http.client.HTTPResponse:
        headers: dict[str, str | bytes] = {"Content-Type": "application/json"}
        if self.key is not None and with_key:
            # The server compares bytes of UTF-8; http.client would send Latin-1.
            headers["Authorization"] = f"Bearer {self.key}".encode()
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse()


@dataclass
class Streamed:
    """A streamed answer and its clock; times are `perf_counter` seconds."""

    sent_at_s: float
    text: str = ""
    finish: str | None = None
    token_at_s: list[float] = field(default_factory=list)
    """Arrival of each piece with content."""
    token_number: list[int] = field(default_factory=list)
    """How many tokens the model had produced with that piece: a piece may carry several."""
    timings: dict[str, Any] = field(default_factory=dict)
    """The server's own, of the last event."""

    def add(self, event: dict[str, Any], at_s: float) -> None:
        if "error" in event:
            raise DeviceError(f"the stream broke off: {_message(event)}")
        self.timings = event.get("timings") or self.timings
        for choice in event.get("choices", []):
            self.finish = choice.get("finish_reason") or self.finish
            content = _text(choice["delta"])
            if content:
                self.text += content
                self.token_at_s.append(at_s)
                self.token_number.append(int(self.timings.get("predicted_n", len(self.token_at_s))))

    @property
    def ttft_s(self) -> float:
        """Request sent → first token with content. Raises DeviceError when there was none."""
        if not self.token_at_s:
            raise DeviceError("the model answered without a single token of text")
        return self.token_at_s[0] - self.sent_at_s

    @property
    def tpot_s(self) -> float:
        """(last token − first token) / (tokens − 1). Raises DeviceError below two tokens."""
        gaps = self.token_number[-1] - self.token_number[0] if self.token_number else 0
        if gaps < 1:
            raise DeviceError("the model answered with fewer than two tokens: no time between tokens to measure")
        return (self.token_at_s[-1] - self.token_at_s[0]) / gaps


def _arrivals(response: http.client.HTTPResponse) -> list[tuple[float, bytes]]:
    """What came, and when. It is read as it comes and taken apart later: on a small machine the reader and the model
    share the cores, and a reader that is slow is measured too."""
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append((time.perf_counter(), piece))
    return pieces


def _events(arrivals: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """The JSON objects of a server-sent event stream, up to [DONE], each at the time its line was whole."""
    rest = b""
    for at_s, piece in arrivals:
        *lines, rest = (rest + piece).split(b"\n")
        for raw in lines:
            line = raw.decode("utf-8").rstrip("\r")
            if line.startswith("data: ") and line != "data: [DONE]":
                yield at_s, json.loads(line[len("data: ") :])
            elif line.startswith("error: "):
                yield at_s, {"error": json.loads(line[len("error: ") :])}


def _text(message: dict[str, Any]) -> str:
    """What the model said: llama-server files a model's thoughts, where it has any, under another key."""
    return (message.get("reasoning_content") or "") + (message.get("content") or "")


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", errors="replace") or None


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
