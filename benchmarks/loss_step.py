"""What a step of the distillation loss costs: time and peak memory of loss + gradient by the hidden states.

For each divergence, beside cross-entropy alone and beside the dense way: log_softmax over [tokens, vocabulary] with
autograd.

    python benchmarks/loss_step.py --vocabulary 128256 --hidden 2048 --tokens 2048 --top-k 64 --device cuda
    python benchmarks/loss_step.py --vocabulary 8192 --hidden 64 --tokens 256 --top-k 16 --rounds 5

One process, one round after the other, every variant once in each round: a ratio is between medians of the same rounds.
The head and its product are part of every figure, the model below the head is not. Random numbers stand for weights,
states and teacher: the loss takes the same steps whatever they are. Memory is what is allocated above the state before
the step, at its peak: on a GPU by its allocator, on a CPU by the profiler, in a step that is not timed.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from toolchain.student.losses import Divergence, Objective, Teacher, distillation_loss, pick_chunk

WARM_UPS = 2
Step = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One variant, and its ratios to cross-entropy alone."""

    variant: str
    seconds: list[float]
    median_s: float
    time_ratio: float
    peak_bytes: int
    memory_ratio: float
    peak_in_chunks: float
    """Peak over the bytes of float32 [chunk, vocabulary]"""


@dataclass(frozen=True)
class Case:
    """One step's tensors."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    teacher: Teacher


def main() -> None:
    options = _options()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    chunk = options.chunk or pick_chunk(options.vocabulary, device)
    case = make_case(options, device, dtype)
    found = measure(steps(case, options.temperature, chunk), device, options.rounds, 4 * chunk * options.vocabulary)
    names = ("vocabulary", "hidden", "tokens", "top_k", "temperature", "rounds")
    on_cpu = f"CPU, {torch.get_num_threads()} threads"
    conditions = {
        **{name: getattr(options, name) for name in names},
        "chunk": chunk,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps({"conditions": conditions, "results": [asdict(result) for result in found]}, indent=1))
        return
    print("  ".join(f"{name}={value}" for name, value in conditions.items()))
    print(f"{'':20}{'ms':>10}{'/ CE':>8}{'peak MiB':>11}{'/ CE':>8}{'[chunk, V]':>12}")
    for result in found:
        print(
            f"{result.variant:20}{1e3 * result.median_s:10.2f}{result.time_ratio:8.2f}"
            f"{result.peak_bytes / 2**20:11.1f}{result.memory_ratio:8.2f}{result.peak_in_chunks:12.2f}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time and memory of the distillation loss, against cross-entropy alone."
    )
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--chunk", type=int, help="positions per use of the head; left out: as in training")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="left out: bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not 0 < options.top_k < options.vocabulary:
        parser.error("--top-k must be above 0 and below --vocabulary")
    if min(options.tokens, options.hidden, options.rounds) < 1:
        parser.error("--tokens, --hidden and --rounds must be above 0")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no NVIDIA GPU here")
    return options


def make_case(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Case:
    generator = torch.Generator(device).manual_seed(0)
    on: dict[str, Any] = {"generator": generator, "device": device}
    n, k, vocabulary = options.tokens, options.top_k, options.vocabulary
    start = torch.randint(0, vocabulary, (n, 1), **on)
    ids = (start + torch.arange(k, device=device) * (vocabulary // k)) % vocabulary
    logprobs = (3 * torch.randn(n, k + 1, **on)).log_softmax(-1)[:, :k]
    return Case(
        torch.randn(n, options.hidden, **on).to(dtype).requires_grad_(),
        (torch.randn(vocabulary, options.hidden, **on) / math.sqrt(options.hidden)).to(dtype),
        torch.randint(0, vocabulary, (n,), **on),
        Teacher(ids, logprobs),
    )


def steps(case: Case, temperature: float, chunk: int) -> dict[str, Step]:
    """Variants by name, cross-entropy first; each leaves no gradient behind."""

    def ours(name: Divergence, kl_weight: float) -> None:
        objective = Objective(temperature, 0.5, kl_weight, name, jsd_beta=0.5, skew=0.1)
        loss = distillation_loss(
            case.hidden,
            lambda part: part @ case.weight.T,
            case.labels,
            case.teacher,
            objective=objective,
            weight=case.weight,
            tokens=len(case.labels),
            chunk=chunk,
        )
        _backward(loss.total, case.hidden)

    def dense() -> None:
        logits = (case.hidden @ case.weight.T).float()
        log_q = (logits / temperature).log_softmax(-1).gather(-1, case.teacher.ids)
        log_p = case.teacher.logprobs
        q_tail, p_tail = (1 - mass.exp().sum(-1).clamp(max=1 - 1e-6) for mass in (log_q, log_p))
        kl = (log_p.exp() * (log_p - log_q)).sum() + (p_tail * (p_tail / q_tail).log()).sum()
        total = 0.5 * functional.cross_entropy(logits, case.labels, reduction="sum") + 0.5 * temperature**2 * kl
        _backward(total / len(case.labels), case.hidden)

    names: tuple[Divergence, ...] = get_args(Divergence)
    return {
        "cross-entropy": partial(ours, "forward_kl", 0.0),
        **{f"+ {name}": partial(ours, name, 0.5) for name in names},
        "dense, + forward_kl": dense,
    }


def _backward(total: torch.Tensor, leaf: torch.Tensor) -> None:
    total.backward()  # type: ignore[no-untyped-call]
    leaf.grad = None


def measure(variants: dict[str, Step], device: torch.device, rounds: int, unit: int) -> list[Result]:
    """`unit` is the size in bytes that peaks are counted in."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for at in range(WARM_UPS + rounds):
        for name, step in variants.items():
            seconds = _timed(step, device)
            if at >= WARM_UPS:
                samples[name].append(seconds)
    peaks = {name: _peak_bytes(step, device) for name, step in variants.items()}
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    base = next(iter(variants))
    return [
        Result(
            name,
            samples[name],
            medians[name],
            medians[name] / medians[base],
            peaks[name],
            peaks[name] / peaks[base],
            peaks[name] / unit,
        )
        for name in variants
    ]


def _timed(step: Step, device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(step: Step, device: torch.device) -> int:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
