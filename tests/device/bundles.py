"""Small bundles around real programs that need nothing but glibc, for tests of what is done with bundles."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.device import tiny_chat
from toolchain.bundle import build
from toolchain.device import files, processor
from toolchain.errors import HostError
from toolchain.gguf import llama_cpp
from toolchain.gguf.llama_cpp import LlamaCpp
from toolchain.reporter import Silent
from toolchain.target import TargetProfile, read_target

_TRUE = Path(shutil.which("true") or "/bin/true")
Make = Callable[..., Path]


def _row(name: str, kl: float, previous: float | None, adapter: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": 2_000_000,
        "adapter_parameters": adapter,
        "bytes": 8_000_000,
        "cross_entropy": 1.5 + kl,
        "perplexity": 4.5,
        "kl_to_teacher": kl,
        "top1_agreement": 0.5,
        "kl_to_previous": previous,
    }


LEDGER: dict[str, Any] = {
    "held_out_rows": 3,
    "answer_tokens": 60,
    "vocabulary": 259,
    "rows": [
        _row("teacher", 0.0, None),
        _row("student before", 1.0, None),
        _row("student after", 0.25, None, adapter=1000),
        _row("GGUF F32", 0.26, 0.001),
    ],
    "gain": {
        "judged_by": "kl_to_teacher",
        "before": 1.0,
        "after": 0.25,
        "difference": 0.75,
        "low": 0.5,
        "high": 0.9,
        "confidence": 0.95,
        "resamples": 2000,
    },
    "quantization": {
        "file_type": "F32",
        "bits_per_weight": 32.0,
        "tensor_types": {"F32": 12},
        "fallbacks": [],
        "allocation": {},
    },
    "gates": [{"name": "KL(adapter ‖ merged)", "value": 1e-7, "limit": 1e-5, "passed": True}],
}
"""In the form of ledger.json, with the gates as the pipeline adds them."""


def x86_llama() -> LlamaCpp:
    """The build for x86-cpu, which setting up makes; skips where there is none, with what makes it."""
    try:
        return llama_cpp.find(read_target("x86-cpu").runtime.cmake)
    except HostError as error:
        pytest.skip(error.message)


def install(root: Path) -> LlamaCpp:
    """An installed build's layout."""
    (root / "bin").mkdir(parents=True)
    (root / "source").mkdir()
    (root / "source" / "LICENSE").write_text("MIT\n")
    for name in ("llama-server", "llama-bench"):
        shutil.copyfile(_TRUE.resolve(), root / "bin" / name)
    return LlamaCpp(root=root, commit="0" * 40, key="k", flags=("-DA=ON",))


def target(**runtime: Any) -> TargetProfile:
    """x86-cpu, for programs of this host: they may ask for its glibc."""
    profile = read_target("x86-cpu")
    changed = {"glibc_floor": platform.libc_ver()[1], **runtime}
    return profile.model_copy(update={"runtime": profile.runtime.model_copy(update=changed)})


def maker(llama: LlamaCpp, model: Path, tmp_path: Path) -> Make:
    """A function that makes a bundle in a folder below `tmp_path`, with whatever is to be other than usual."""

    def bundle(place: str = "out", **changed: Any) -> Path:
        out = tmp_path / place
        out.mkdir()
        arguments: dict[str, Any] = {
            "target": target(),
            "gguf": model,
            "quantize_facts": {"fallbacks": []},
            "ledger": LEDGER,
            "golden": tiny_chat.golden(),
            "lineage": {"quantize": "sha256:" + "0" * 64},
            "llama": llama,
            "answering": None,
            **changed,
        }
        settings = arguments.pop("settings", build.BundleSettings(name="tiny", version="1.0", context=512))
        facts = build.run(settings, **arguments, out=out, report=Silent())
        assert facts["bundle_id"] == files.open_bundle(out / facts["folder"]).id
        return out / str(facts["folder"])

    return bundle


def around(
    llama: LlamaCpp,
    for_target: TargetProfile,
    out: Path,
    *,
    version: str = "1.0",
    system: str | None = None,
    context: int = tiny_chat.CONTEXT,
    **model: Any,
) -> Path:
    """A bundle of the tiny chat model, in `out`, with the programs that were built for a target.

    `model`: what is to be other than usual in it.
    """
    facts = build.run(
        build.BundleSettings(name="tiny", version=version, context=context, system=system),
        target=for_target,
        gguf=tiny_chat.write_gguf(out / "model.gguf", context=context, **model),
        quantize_facts={},
        ledger=None,
        golden=tiny_chat.golden(),
        lineage={},
        llama=llama,
        answering=llama if for_target.arch == "x86_64" else x86_llama(),
        out=out,
        report=Silent(),
    )
    return out / str(facts["folder"])


def releases(llama: LlamaCpp, folder: Path) -> dict[str, Path]:
    """Two good bundles, 1 and 2, and one, 3, whose answers do not end."""
    made = {}
    for name, version, eos in (("1", "1", "<|fin|>"), ("2", "2", "<|fin|>"), ("endless", "3", "<|other|>")):
        (folder / version).mkdir()
        made[name] = around(llama, read_target("x86-cpu"), folder / version, version=version, eos=eos)
    return made


def reseal(folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """As whoever changes a bundle on purpose would: every digest fits. `manifest`: another one than is there."""
    manifest = json.loads((folder / files.MANIFEST).read_text()) if manifest is None else manifest
    for name, facts in manifest["files"].items():
        facts["sha256"], facts["bytes"] = files.sha256(folder / name), (folder / name).stat().st_size
    manifest["bundle_id"] = files.bundle_id(manifest)
    text = json.dumps(manifest)
    (folder / files.MANIFEST).write_text(text)
    (folder / files.SUMS).write_text(files.sums_text(manifest, hashlib.sha256(text.encode()).hexdigest()))


def promise_cuda(folder: Path) -> None:
    """The manifest of a bundle then says CUDA, which no build without it could come by."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    manifest["runtime"]["backend"] = "CUDA"
    reseal(folder, manifest)


def ask_too_much(folder: Path) -> str:
    """The manifest then says that the programs need what this processor lacks: what. Skips where it lacks nothing."""
    cores = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    for option, names in processor._X86_EXTRA_OPTIONS.items():
        if cores and names[0] not in cores[0].split():
            manifest = json.loads((folder / files.MANIFEST).read_text())
            manifest["runtime"]["flags"] = ["-DGGML_NATIVE=OFF", f"-D{option}=ON"]
            reseal(folder, manifest)
            return names[0]
    pytest.skip("this processor has every instruction that a bundle can ask for")


def every_byte(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Path → mode and content of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edgectl(
    folder: Path, *arguments: str, path: str = "/usr/bin:/bin", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The bundle's own edgectl, by the system's Python, without packages and without our environment."""
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    argv = [python, "-I", "-S", str(folder / "edgectl"), *arguments]
    return subprocess.run(argv, env={"PATH": path, **environment}, capture_output=True, text=True, check=False)


def toolchain(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Our command line, in a process of its own."""
    argv = [sys.executable, "-m", "toolchain.cli", *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
