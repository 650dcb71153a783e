"""The golden prompts' greedy answers, by a llama-server of this host → eval/answers.json, which edgectl smoke reads."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.device import greedy, launch, probe, serve
from toolchain.device.client import Client
from toolchain.device.errors import DeviceError
from toolchain.errors import ExternalToolError

if TYPE_CHECKING:
    from toolchain.gguf.llama_cpp import LlamaCpp


def record(
    folder: Path,
    presets: dict[str, Any],
    golden: Sequence[dict[str, Any]],
    *,
    room: int,
    llama: "LlamaCpp",
) -> dict[str, Any]:
    """Answer each prompt as the bundle in `folder` would, by its presets' command but with the programs of `llama`.

    `room`: tokens that a prompt and its answer may have together. Raises ExternalToolError.
    """
    port = serve.free_port()
    # One thread: any number gives the same answers, and several that share their cores take many times as long.
    values = {"bundle": str(folder), "host": "127.0.0.1", "port": str(port), "threads": "1"}
    _, *options = presets["server"]["argv"]
    argv = [str(llama.program("llama-server")), *serve.fill(options, values), *serve.TRACE]
    try:
        child = launch.spawn(argv, cwd=str(folder))
        with serve.Server(child, host="127.0.0.1", port=port) as server:
            server.wait_ready(presets["server"]["ready_timeout_s"])
            client = Client("127.0.0.1", port)
            answers = [
                greedy.ask(client, prompt["messages"], min(greedy.TOKENS, room - len(prompt["prompt_ids"])))
                for prompt in golden
            ]
            libraries = server.libraries()
    except (DeviceError, OSError) as error:
        raise ExternalToolError(
            f"the golden prompts could not be answered here: {error}", hint="does the model load in this llama.cpp?"
        ) from error
    return {
        "schema_version": greedy.SCHEMA_VERSION,
        "made_by": {
            "llama_cpp_commit": llama.commit,
            "flags": list(llama.flags),
            "library": ", ".join(libraries) or "built in",
            "processor": probe.cpu_model(),
        },
        "answers": [asdict(answer) for answer in answers],
    }
