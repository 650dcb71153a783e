"""Several clients that ask one server for different things at once: what came of each request, and how long it took."""

import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.device.client import Client
from toolchain.device.errors import DeviceError

PATH = "/v1/chat/completions"
MARKER = "hippogriff"
"""In every prompt: a log in which it stands has quoted one."""
SCHEMA = {
    "type": "object",
    "properties": {"works": {"type": "boolean"}},
    "required": ["works"],
    "additionalProperties": False,
}
Outcome = tuple[float | None, str | None]
"""Seconds to the first token where there is a stream, and what is wrong."""


@dataclass(frozen=True)
class Sample:
    """One request. `wrong` says what was not as it should be."""

    kind: str
    whole_s: float
    ttft_s: float | None
    wrong: str | None


def body(words: str = "", **options: Any) -> dict[str, Any]:
    """A chat request; `words` are added to its prompt."""
    content = f"{MARKER}: does this work? {words}".strip()
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 50, **options}


def _whole(client: Client, context: int) -> Outcome:
    text = client.post(PATH, body())["choices"][0]["message"]["content"]
    return None, None if text else "no text"


def _streamed(client: Client, context: int) -> Outcome:
    streamed = client.stream_chat(body()["messages"], temperature=0, max_tokens=50)
    return streamed.ttft_s, None if streamed.finish in ("stop", "length") else f"finish is {streamed.finish}"


def _cancelled(client: Client, context: int) -> Outcome:
    """Hang up at the first token of an answer that would fill half the context."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=client.timeout_s)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {client.key}"}
    start_s = time.perf_counter()
    try:
        asked = body(max_tokens=context // 2, ignore_eos=True, stream=True)
        connection.request("POST", PATH, json.dumps(asked), headers)
        for line in connection.getresponse():
            if b'"content":"' in line:
                return time.perf_counter() - start_s, None
        return None, "the stream ended without a token"
    finally:
        connection.close()


def _oversized(client: Client, context: int) -> Outcome:
    status, answer = client.request("POST", PATH, body("more " * context))
    clear = status == 400 and "exceeds the available context size" in str(answer)
    return None, None if clear else f"status {status}: {answer}"


def _wrong_key(client: Client, context: int) -> Outcome:
    status, answer = Client(client.host, client.port, f"{client.key}x").request("POST", PATH, body())
    return None, None if status == 401 and "Invalid API Key" in str(answer) else f"status {status}: {answer}"


def _schema(client: Client, context: int) -> Outcome:
    form = {"type": "json_schema", "json_schema": {"name": "works", "schema": SCHEMA, "strict": True}}
    text = client.post(PATH, body(response_format=form))["choices"][0]["message"]["content"]
    try:
        fits = set(json.loads(text)) == {"works"}
    except ValueError:
        fits = False
    return None, None if fits else f"does not fit the schema: {text!r}"


KINDS: dict[str, Callable[[Client, int], Outcome]] = {
    "whole": _whole,
    "streamed": _streamed,
    "cancelled": _cancelled,
    "oversized": _oversized,
    "wrong key": _wrong_key,
    "schema": _schema,
}


def run(client: Client, *, context: int, requests: int, clients: int) -> list[Sample]:
    """So many requests of all kinds in turn, by so many clients at once. `client` has a key that is let in."""
    numbers, samples = iter(range(requests)), []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            sample = _one(client, context, list(KINDS)[number % len(KINDS)])
            with lock:
                samples.append(sample)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return samples


def _one(client: Client, context: int, kind: str) -> Sample:
    start_s = time.perf_counter()
    try:
        ttft_s, wrong = KINDS[kind](client, context)
    except (DeviceError, OSError, http.client.HTTPException) as error:
        ttft_s, wrong = None, repr(error)
    return Sample(kind, time.perf_counter() - start_s, ttft_s, wrong)


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """By kind: how many, how many wrong, and percentiles in seconds."""
    shown: dict[str, Any] = {}
    for kind in dict.fromkeys(sample.kind for sample in samples):
        own = [sample for sample in samples if sample.kind == kind]
        firsts = [sample.ttft_s for sample in own if sample.ttft_s is not None]
        shown[kind] = {
            "requests": len(own),
            "wrong": sum(sample.wrong is not None for sample in own),
            "whole_s": _percentiles([sample.whole_s for sample in own]),
            **({"ttft_s": _percentiles(firsts)} if firsts else {}),
        }
    return shown


def table(record: dict[str, Any]) -> str:
    """What benchmarks/load.py found, in milliseconds, as Markdown."""
    lines = [
        f"{record['requests']} requests by {record['clients']} clients in {record['elapsed_s']:.0f} s, a model of "
        f"{record['model_bytes'] / 1e6:.1f} MB, slots: {record['parallel']}, {record['processor']}, "
        f"{record['threads']} threads; other programs used {record['foreign_cpu_share']:.1%} of the processors; "
        f"memory {record['usage_before']['rss_kib'] >> 10} → {record['usage_after']['rss_kib'] >> 10} MiB",
        "",
        "| kind | requests | not as expected | first token: p50, p95, p99 (ms) | whole: p50, p95, p99 (ms) |",
        "|---|---|---|---|---|",
    ]
    for kind, found in record["kinds"].items():
        shown = (found.get("ttft_s"), found["whole_s"])
        times = (", ".join(f"{1000 * value:.0f}" for value in (part or {}).values()) for part in shown)
        lines.append(f"| {' | '.join((kind, str(found['requests']), str(found['wrong']), *times))} |")
    return "\n".join(lines)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    """By nearest rank: values that were seen."""
    ordered = sorted(values)
    return {f"p{share}": round(ordered[math.ceil(share / 100 * len(ordered)) - 1], 4) for share in (50, 95, 99)}
