"""Does the bundle do on this machine what it did where it was built? Named checks, all run, on one server start."""

import hashlib
import json
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import files, greedy, serve, verify
from .client import Client
from .errors import DeviceError
from .serve import Server
from .verify import Check, check

_MAX_TOKENS = 512
_STREAMED_PROMPTS = 3
_EOS_SHARE = 0.5
_JSON_TOKENS = 64
_CLEAN_STOP_S = 8.0
_LOG_WAIT_S = 5.0


def run(bundle: files.Bundle, say: Callable[[str], None]) -> dict[str, Any]:
    """Every check; the report is JSON-able and has "ok"."""
    say("hashing every file")
    checks = [verify.file_check(bundle), *verify.host_checks(bundle)]
    with _scratch() as folder:
        key_file = Path(folder, "key")
        key_file.touch(mode=0o600)
        key = secrets.token_hex(16)
        key_file.write_text(key + "\n", encoding="utf-8")
        port = serve.free_port()
        say(f"starting llama-server on port {port}")
        try:
            with serve.start(bundle, host="127.0.0.1", port=port, key_file=key_file, extra=serve.TRACE) as server:
                seconds = server.wait_ready(serve.ready_timeout_s(bundle))
                checks.append(check("server ready", True, _ready(server, seconds)))
                checks.append(_checked("backend", lambda: _backend(bundle, server)))
                checks += _served(bundle, Client("127.0.0.1", port, key), say)
                checks.append(_stop(server))
        except DeviceError as error:
            checks.append(check("server ready", False, error.message))
    return verify.report(bundle.id, checks)


def live(bundle: files.Bundle, client: Client, say: Callable[[str], None]) -> dict[str, Any]:
    """The checks that can be made of a server that runs already, on its own address."""
    return verify.report(bundle.id, list(_served(bundle, client, say)))


def _ready(server: Server, seconds: float) -> str:
    """What /health said. A model that is loaded between two questions is not seen to load."""
    unseen = "" if "503" in server.health else "; 503 was not seen: it listened and was ready between two questions"
    return f"{' → '.join(server.health)} in {seconds:.2f} s{unseen}"


def _scratch() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="edgectl-")
    except OSError as error:
        raise DeviceError(
            f"no place for the key file: {error.strerror}", hint="in a container: --tmpfs /tmp; else set TMPDIR"
        ) from None


def _served(bundle: files.Bundle, client: Client, say: Callable[[str], None]) -> Iterator[Check]:
    golden = bundle.golden()
    model = bundle.manifest["model"]
    answers: list[dict[str, Any]] = []

    def eos_check() -> tuple[bool, str]:
        say(f"answering {len(golden)} golden prompts")
        answers[:] = [_answer(client, model, prompt) for prompt in golden]  # all of them, or none
        stopped = sum(answer["finish"] == "stop" for answer in answers)
        enough = bool(golden) and stopped >= _EOS_SHARE * len(golden)
        return enough, f"{stopped} of {len(golden)} golden prompts stop at eos within {_MAX_TOKENS} tokens"

    def fed_check() -> tuple[bool, str]:
        pairs = list(zip(golden, answers, strict=False))
        wrong = [
            number
            for number, (prompt, answer) in enumerate(pairs)
            if answer["prompt_tokens"] != len(prompt["prompt_ids"])
        ]
        return bool(
            pairs
        ) and not wrong, f"{len(pairs) - len(wrong)} of {len(golden)} chats feed as many ids as expected"

    named: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("model digest", lambda: _model_digest(bundle, client)),
        ("chat template", lambda: _template(model, client)),
        ("special tokens", lambda: _special_tokens(model, client)),
        ("golden prompt ids", lambda: _golden_ids(golden, client)),
        ("stops at eos", eos_check),
        ("chat feeds those ids", fed_check),
        ("greedy answers", lambda: _greedy_answers(bundle, client, golden, answers)),
        ("streamed = whole", lambda: _streamed(client, model, golden, answers)),
        ("answers in JSON", lambda: _json_answer(client)),
    ]
    if client.key is not None:
        named.append(("API key", lambda: _api_key(client)))
    for name, function in named:
        yield _checked(name, function)


def _checked(name: str, function: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return check(name, *function())
    except DeviceError as error:
        return check(name, False, error.message)
    except OSError as error:
        return check(name, False, f"the server does not answer: {error}")


def _backend(bundle: files.Bundle, server: Server) -> tuple[bool, str]:
    """Where the weights lie, and the library that was loaded for it: most of them on the backend that is promised, or
    as many layers on it as the profile asks for."""
    expected = str(bundle.manifest["runtime"]["backend"])
    end_s = time.monotonic() + _LOG_WAIT_S
    while not (held := _held(server)) and time.monotonic() < end_s:
        time.sleep(0.05)  # on a busy machine the log is read later than the server answers
    libraries = server.libraries()
    if not held:
        return False, "the server's log does not say where the weights are"
    asked = _layers_on_gpu(bundle)
    # Buffers are named after the device: CPU, CPU_Mapped, CPU_REPACK, CUDA0.
    names = [name for name in held if name.startswith(expected)] if asked is not None else list(held)
    used = max(names or held, key=lambda name: held[name])
    shown = f"{used} holds {held[used]:.0f} MiB of weights; loaded: {', '.join(libraries) or 'built in'}"
    right, wanted = used.startswith(expected), expected
    for line in list(server.log) if expected != "CPU" else []:
        if match := re.search(r"offloaded (\d+)/(\d+) layers", line):
            offloaded, total = int(match[1]), int(match[2])
            right = right and offloaded == (total if asked is None else min(asked, total))
            shown += f"; {offloaded} of {total} layers on the GPU"
            wanted = expected if asked is None else f"{expected} with {asked} layers"
    return right, f"{shown}; {wanted} is expected"


def _layers_on_gpu(bundle: files.Bundle) -> int | None:
    """As many as the profile asks for; None for all."""
    argv = bundle.presets()["server"]["argv"]
    given = argv[argv.index("--n-gpu-layers") + 1] if "--n-gpu-layers" in argv else "all"
    return None if given == "all" else int(given)


def _held(server: Server) -> dict[str, float]:
    """Buffer of weights → MiB, as far as the log has been read."""
    held: dict[str, float] = {}
    for line in list(server.log):
        match = re.search(r"(\S+)\s+model buffer size =\s*([0-9.]+) MiB", line)
        if match:
            held[match[1]] = held.get(match[1], 0.0) + float(match[2])
    return held


def _model_digest(bundle: files.Bundle, client: Client) -> tuple[bool, str]:
    path = Path(client.get("/props")["model_path"])
    digest = files.sha256(path)
    same = digest == bundle.manifest["model"]["sha256"] and path.samefile(bundle.model)
    return same, f"the server has {path.name}, sha256 {digest}"


def _template(model: dict[str, Any], client: Client) -> tuple[bool, str]:
    text = str(client.get("/props")["chat_template"])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return digest == model["chat_template_sha256"], f"sha256 {digest[:16]}…, {len(text)} characters"


def _special_tokens(model: dict[str, Any], client: Client) -> tuple[bool, str]:
    """Text and id of bos and eos; a model without a bos has no bos to compare."""
    props = client.get("/props")
    wrong = []
    for name in ("bos", "eos"):
        expected = model[name]
        if expected is None:
            continue
        text = props[f"{name}_token"]
        ids = client.post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        if text != expected["text"] or ids != [expected["id"]]:
            wrong.append(f"{name} is {text!r} {ids}, expected {expected['text']!r} [{expected['id']}]")
    shown = ", ".join(f"{name} {model[name]['id']}" for name in ("bos", "eos") if model[name] is not None)
    return not wrong, "; ".join(wrong) or shown


def _golden_ids(golden: list[dict[str, Any]], client: Client) -> tuple[bool, str]:
    for number, prompt in enumerate(golden):
        ids = client.prompt_ids(prompt["messages"])
        if ids != prompt["prompt_ids"]:
            pairs = zip(ids, prompt["prompt_ids"], strict=False)
            shared = min(len(ids), len(prompt["prompt_ids"]))
            at = next((index for index, (a, b) in enumerate(pairs) if a != b), shared)
            return False, f"prompt {number}: {len(ids)} ids, expected {len(prompt['prompt_ids'])}; differs at {at}"
    return bool(golden), f"{len(golden)} prompts give the same ids as the tokenizer they were trained with"


def _answer(client: Client, model: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    return client.chat(prompt["messages"], logprobs=True, top_logprobs=1, **_greedy(model, prompt))


def _greedy(model: dict[str, Any], prompt: dict[str, Any]) -> dict[str, object]:
    room = int(model["context"]) // int(model["parallel"]) - len(prompt["prompt_ids"])
    return {"temperature": 0, "seed": 0, "max_tokens": max(1, min(_MAX_TOKENS, room))}


def _greedy_answers(
    bundle: files.Bundle, client: Client, golden: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> tuple[bool, str]:
    recorded = bundle.answers()
    if recorded is None:
        return True, "nothing to compare with: the bundle was built without recorded answers"
    if not answers:
        return False, "there is no answer to compare with"
    own = [[int(token["id"]) for token in answer["tokens"]] for answer in answers]
    return greedy.compare(client, [prompt["prompt_ids"] for prompt in golden], recorded, own)


def _streamed(
    client: Client, model: dict[str, Any], golden: list[dict[str, Any]], answers: list[dict[str, Any]]
) -> tuple[bool, str]:
    if not answers:
        return False, "there is no whole answer to compare with"
    compared = list(zip(golden, answers, strict=True))[:_STREAMED_PROMPTS]
    for number, (prompt, answer) in enumerate(compared):
        streamed = client.stream_chat(prompt["messages"], **_greedy(model, prompt))
        if (streamed.text, streamed.finish) != (answer["text"], answer["finish"]):
            return False, f"prompt {number}: {streamed.text[:60]!r} streamed, {answer['text'][:60]!r} whole"
    return True, f"{len(compared)} answers are the same at temperature 0"


def _json_answer(client: Client) -> tuple[bool, str]:
    """An answer under a JSON schema fits it: the server's grammar works with this model's tokens."""
    schema = {
        "type": "object",
        "properties": {"works": {"type": "boolean"}},
        "required": ["works"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "works", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": "Does this work? Answer in JSON."}]
    answer = client.chat(messages, temperature=0, seed=0, max_tokens=_JSON_TOKENS, response_format=form)
    try:
        said = json.loads(answer["text"])
    except ValueError:
        return False, f"asked for by a schema, got {answer['text'][:80]!r}"
    fits = isinstance(said, dict) and set(said) == {"works"} and isinstance(said["works"], bool)
    return fits, f"asked for by a schema, got {json.dumps(said)[:80]}"


def _api_key(client: Client) -> tuple[bool, str]:
    without, _ = client.request("GET", "/v1/models", with_key=False)
    chat, _ = client.request("POST", "/v1/chat/completions", {"messages": []}, with_key=False)
    health, _ = client.request("GET", "/health", with_key=False)
    with_key, _ = client.request("GET", "/v1/models")
    detail = f"without the key: models {without}, chat {chat}, health {health}; with it: models {with_key}"
    return (without, chat, health, with_key) == (401, 401, 200, 200), detail


def _stop(server: Server) -> Check:
    code, seconds = server.stop()
    try:
        serve.check_address(server.host, server.port, has_key=False)
        freed = True
    except DeviceError:
        freed = False
    detail = f"exit code {code} {seconds:.2f} s after SIGTERM, port {'freed' if freed else 'still taken'}"
    return check("stops on SIGTERM", code == 0 and seconds < _CLEAN_STOP_S and freed, detail)
