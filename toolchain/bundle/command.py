"""TargetProfile → command lines of llama-server and llama-bench on the device. Pure: placeholders, no paths.

The result is written to the bundle's presets.json; device/serve.py fills in {bundle}, {host}, {port}, {threads} and
{api_key_file}, and device/bench.py the counts.
"""

from typing import Any

from toolchain.target import TargetProfile

WEB = "web"
"""Folder of the chat page in a bundle: all that is in it is served."""
PROGRAMS = "runtime/bin"
"""Folder of programs, libraries and backends in a bundle: one, since ggml looks for backends beside the program."""

_SILENCE_S = 30
"""So long a client may neither send nor take a byte; llama-server's own default is an hour."""


def server_argv(target: TargetProfile, *, model: str, alias: str, context: int) -> list[str]:
    """llama-server for one model. `model` is its path inside the bundle, `context` the tokens of all slots together."""
    return [
        f"{{bundle}}/{PROGRAMS}/llama-server",
        *("--model", f"{{bundle}}/{model}"),
        *("--alias", alias),
        *("--host", "{host}"),
        *("--port", "{port}"),
        *("--threads", "{threads}"),
        *("--threads-batch", "{threads}"),
        *("--ctx-size", str(context)),
        *("--parallel", str(target.server.parallel)),
        *("--cache-ram", str(target.server.cache_ram_mib)),
        *_gpu_layers(target),
        *_warm_up(target),
        # What is not given would be shrunk to fit the memory; a bundle that does not fit must say so.
        *("--fit", "off"),
        # A web page that is open on the device has no business with the model.
        *("--cors-origins", "localhost"),
        *("--log-colors", "off"),
        # An answer ends where the context is full, also for a client that sets no limit.
        "--no-context-shift",
        # Of a client that sends half a request, or does not read its answer; it holds one of some thousand threads.
        *("--timeout", str(_SILENCE_S)),
        "--jinja",
        # Our chat page, since the build has none of llama.cpp's. "/" is what the server shows without the key as well.
        *("--path", f"{{bundle}}/{WEB}"),
        "--no-slots",  # it would show one client's prompt to another
        "--metrics",
        "--offline",
    ]


def _gpu_layers(target: TargetProfile) -> list[str]:
    layers = target.server.gpu_layers
    return [] if layers is None else ["--n-gpu-layers", str(layers)]


def _warm_up(target: TargetProfile) -> list[str]:
    """On a processor the first answer does all that a warm-up would, so that one would only be waited for. On a GPU it
    loads kernels, which is not to be the first client's loss."""
    return ["--no-warmup"] if target.runtime.backend == "CPU" else []


def devices_argv() -> list[str]:
    """llama-server, asked what it would compute on."""
    return [f"{{bundle}}/{PROGRAMS}/llama-server", "--list-devices"]


def api_key_argv() -> list[str]:
    """What is added when there is a key."""
    return ["--api-key-file", "{api_key_file}"]


def bench_argv(target: TargetProfile, *, model: str) -> list[str]:
    """llama-bench: JSON on stdout, prefill and decode apart."""
    layers = target.server.gpu_layers
    on_gpu = [] if layers is None else ["--n-gpu-layers", "999" if layers == "all" else str(layers)]
    return [
        f"{{bundle}}/{PROGRAMS}/llama-bench",
        *("--model", f"{{bundle}}/{model}"),
        *("--threads", "{threads}"),
        *("--n-prompt", "{prompt_tokens}"),
        *("--n-gen", "{generated_tokens}"),
        *("--n-depth", "{depth}"),
        *("--repetitions", "{repetitions}"),
        *("--output", "json"),
        *on_gpu,
    ]


def presets(target: TargetProfile, *, model: str, alias: str, context: int) -> dict[str, Any]:
    """Content of presets.json. `threads` null: the physical cores that edgectl may use."""
    return {
        "schema_version": 1,
        "server": {
            "argv": server_argv(target, model=model, alias=alias, context=context),
            "api_key_argv": api_key_argv(),
            "threads": target.server.threads,
            "ready_timeout_s": target.server.ready_timeout_s,
        },
        "devices": {"argv": devices_argv()},
        "bench": {"argv": bench_argv(target, model=model), "options": target.bench.model_dump(mode="json")},
        "budgets": target.budgets.model_dump(exclude_none=True),
    }
