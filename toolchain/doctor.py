"""`toolchain doctor`: is this machine ready, and ready for this recipe? Every finding that stops a run has a remedy."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from toolchain.disk import free_bytes
from toolchain.errors import ToolchainError
from toolchain.recipe import Recipe

State = Literal["ok", "note", "missing"]
TRAIN_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "trl", "safetensors", "numpy", "jinja2",
)  # fmt: skip
GGUF_PACKAGES = ("gguf", "numpy", "sentencepiece", "pyelftools")
_MODULES = {"pyelftools": "elftools", "sentence-transformers": "sentence_transformers"}
_GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    detail: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def as_line(self) -> str:
        mark = {"ok": "✓", "note": "·", "missing": "✗"}[self.state]
        return f"{mark} {self.name}: {self.detail}" + (f"\n    → {self.remedy}" if self.remedy else "")


def examine(recipe: Recipe | None, work: Path) -> list[Finding]:
    """Look at Python, packages, GPU, compilers, llama.cpp, docker, disk and memory, for `recipe` if there is one."""
    findings = [
        _python(),
        *_packages("train", TRAIN_PACKAGES),
        *_packages("gguf", GGUF_PACKAGES),
        *_gpu(),
        *_asked_for(recipe),
        *_compilers(),
        _llama_cpp(),
        _docker(),
    ]
    findings += [_disk(recipe, work), _memory(recipe)]
    return findings


def _python() -> Finding:
    version = platform.python_version()
    return Finding("Python", "ok", f"{version} at {sys.executable}")


def _packages(extra: str, names: tuple[str, ...]) -> Iterator[Finding]:
    remedy = f"pip install -c constraints.txt -e '.[{extra}]'"
    for name in names:
        if importlib.util.find_spec(_MODULES.get(name, name)) is None:
            yield Finding(name, "missing", f"not installed; the {extra} stages need it", remedy)
        else:
            yield Finding(name, "ok", importlib.metadata.version(name))


def _asked_for(recipe: Recipe | None) -> Iterator[Finding]:
    """What this recipe needs beyond the usual."""
    if recipe is None:
        return
    if recipe.select.embedding_model or recipe.compare.embedding_model:
        yield from _packages("embed", ("sentence-transformers",))
    if recipe.teacher.endpoint is not None:
        yield from _packages("endpoint", ("httpx",))
        variable = recipe.teacher.endpoint.key_variable
        if variable and not os.environ.get(variable):
            yield Finding(variable, "note", "not set: the endpoint is asked without a key", f"export {variable}=…")
    on_gpu = _output("nvidia-smi", "-L") is not None
    if on_gpu and recipe.distill.engine != "transformers":
        yield from _packages("unsloth", ("unsloth",))


def _output(*argv: str) -> str | None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpu() -> Iterator[Finding]:
    """A GPU that is there and cannot be used is an error, never a quiet run on the processor."""
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if not listed:
        yield Finding("GPU", "note", "no NVIDIA GPU: training runs on the processor")
        return
    yield Finding("GPU", "ok", "; ".join(listed.splitlines()))
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            yield Finding("torch on the GPU", "ok", f"CUDA {torch.version.cuda}")
        else:
            remedy = "install a CUDA build of torch that fits the driver; or hide the GPU: CUDA_VISIBLE_DEVICES="
            yield Finding("torch on the GPU", "missing", f"torch {torch.__version__} cannot use it", remedy)


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        yield Finding("C++ compiler", "missing", "none found", "apt-get install g++")
    else:
        yield Finding("C++ compiler", "ok", (_output(compiler, "--version") or compiler).splitlines()[0])
    for name in ("cmake", "ninja"):
        inside = Path(sys.prefix) / "bin" / name
        found = str(inside) if inside.exists() else shutil.which(name)
        if found is None:
            yield Finding(name, "missing", "none found", "pip install -c constraints.txt -e '.[gguf]'")
        else:
            yield Finding(name, "ok", (_output(found, "--version") or found).splitlines()[0])


def _llama_cpp() -> Finding:
    from toolchain.gguf import llama_cpp
    from toolchain.pipeline import host_target

    try:
        found = llama_cpp.find(host_target().runtime.cmake)
    except ToolchainError as error:
        return Finding("llama.cpp", "missing", error.message, error.hint)
    return Finding("llama.cpp", "ok", f"commit {found.commit[:12]} at {found.root}")


def _docker() -> Finding:
    version = _output("docker", "version", "--format", "{{.Server.Version}}")
    if version is None:
        return Finding("docker", "note", "no engine answers; only the container builds need one")
    return Finding("docker", "ok", version)


def model_bytes(path: Path) -> int:
    """Bytes of a checkpoint's weights or of one file."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size


def needs(recipe: Recipe) -> tuple[int, int]:
    """(disk, memory) in bytes that a recipe may need, estimated from the weights: generous rather than exact.

    Disk: teacher unpacked, student, merged, 16-bit GGUF, quantized and bundled, and training checkpoints. Memory: the
    larger of a teacher in fp32 and a student in fp32 with room for activations. A GGUF teacher unpacks about fourfold.
    """
    model = recipe.teacher.model
    teacher = model_bytes(model) if model is not None else 0  # an endpoint's weights are elsewhere
    if model is not None and model.is_file() and recipe.teacher.engine != "llama.cpp":
        teacher *= 4
    student = model_bytes(recipe.student.model) if recipe.student.model else teacher
    return teacher + 5 * student + 4 * _GIB, 2 * max(teacher, student) + 3 * _GIB


def _disk(recipe: Recipe | None, work: Path) -> Finding:
    free = free_bytes(work)
    wanted = needs(recipe)[0] if recipe else 10 * _GIB
    detail = f"{free / _GIB:.1f} GiB free for {work}, about {wanted / _GIB:.1f} wanted"
    if free < wanted:
        return Finding("disk", "missing", detail, "free some space, or put --work on a larger disk")
    return Finding("disk", "ok", detail)


def _memory(recipe: Recipe | None) -> Finding:
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: sysconf's figure stands
    wanted = needs(recipe)[1] if recipe else 4 * _GIB
    detail = f"{available / _GIB:.1f} GiB available, about {wanted / _GIB:.1f} wanted"
    if available < wanted:
        return Finding("memory", "missing", detail, "close other programs, or use a machine with more memory")
    return Finding("memory", "ok", detail)
