"""What quantization keeps: error-aware against stock, and both against the converter and llama-quantize by hand.

    python benchmarks/quantization.py WORK [--search-tokens 4096] [--search-trials 30] [--rounds 5] [--json FILE]

WORK holds model/ (a Hugging Face checkpoint), train.jsonl and held_out.jsonl (rows), as benchmarks/train_small.py makes
them. Each step runs in a process of its own. Printed: wall time and memory of our conversion, as `toolchain run` starts
it, and of the converter by hand, in turns (with --convert-only no more than that); whether "stock" is byte for byte
what llama-quantize writes by hand, the table of forms on the held-out rows, and prefill and decode tokens/s of the
forms by llama-bench, in turns. Pictures go to WORK.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolchain.evaluate import pictures
from toolchain.gguf import convert, imatrix, llama_cpp, quantize, speed
from toolchain.pipeline import ConvertSettings, host_cmake
from toolchain.recipe import Card, Imatrix, Quantize
from toolchain.reporter import Silent
from toolchain.worker import run_in_worker


class Lines(Silent):
    def line(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


def child(function: str, *arguments: str) -> dict[str, Any]:
    """One of the functions below in a fresh process: what it returns, its seconds and its peak memory."""
    argv = [sys.executable, __file__, "--child", function, *arguments]
    ran = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@dataclass
class Memory:
    """Of a tree of processes, seen every twentieth of a second."""

    most_of_one: int = 0
    """Most resident bytes of one process, by its own account (VmHWM)."""
    most_at_once: int = 0
    """Most bytes of all at once; what several share is counted once (PSS)."""

    def look(self, root: int) -> None:
        at_once = 0
        for pid in descendants(root):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:  # it is over
                continue
            if resident := re.search(r"VmHWM:\s+(\d+) kB", status):
                self.most_of_one = max(self.most_of_one, int(resident[1]) * 1024)
            if share := re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE):
                at_once += int(share[1]) * 1024
        self.most_at_once = max(self.most_at_once, at_once)


def descendants(pid: int) -> list[int]:
    try:
        tasks = [task / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def processor_seconds() -> float:
    """Of all processes that this one has started and that are over."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@contextmanager
def watched() -> Iterator[Memory]:
    """Memory of what this process starts meanwhile."""
    memory, over = Memory(), Event()

    def watch() -> None:
        while not over.wait(0.05):
            memory.look(os.getpid())

    thread = Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def our_convert(work: Path, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True)
    settings = ConvertSettings(name=work.name, version="0.1.0", card=Card(), max_kl=1e-3, cmake=host_cmake())
    job = {
        "stage": "convert",
        "settings": settings.model_dump(mode="json"),
        "inputs": {"model": str((work / "model").resolve())},
        "out": str(out.resolve()),
    }
    return run_in_worker(job, log=out.parent / "convert.log", report=Silent())


def by_hand_convert(work: Path, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True)
    llama = llama_cpp.find(host_cmake())
    argv = [sys.executable, str(llama.converter), str(work / "model"), "--outfile", str(out / convert.OUTPUT)]
    subprocess.run([*argv, "--outtype", "f16"], check=True, capture_output=True)
    return {}


def conversions(work: Path, made: Path, rounds: int) -> dict[str, Any]:
    """Both in turns: seconds of each round, and in a further round, which the looking slows down, memory."""
    found: dict[str, Any] = {}
    ways = {"by hand": by_hand_convert, "the stage": our_convert}
    for number in range(rounds + 1):
        for name, way in ways.items():
            out = made / "convert"
            shutil.rmtree(out, ignore_errors=True)
            started, before = time.monotonic(), processor_seconds()
            metrics = way(work, out)
            # The first warms up the page cache.
            if number:
                one = found.setdefault(name, {"seconds": [], "processor_seconds": []})
                one["seconds"].append(time.monotonic() - started)
                one["processor_seconds"].append(processor_seconds() - before)
                one["metrics"] = metrics
    for name, way in ways.items():
        shutil.rmtree(made / "convert")
        with watched() as memory:
            way(work, made / "convert")
        found[name] |= {"most_of_one": memory.most_of_one, "most_at_once": memory.most_at_once}
    for name in ways:
        one, seconds = found[name], found[name]["seconds"]
        print(
            f"convert, {name:9} {median(seconds):6.1f} s ({min(seconds):.1f} to {max(seconds):.1f}), "
            f"{median(one['processor_seconds']):.1f} s of processors; "
            f"one process {one['most_of_one'] / 2**20:.0f} MiB, at once {one['most_at_once'] / 2**20:.0f} MiB"
        )
    ratios = [
        ours / theirs for ours, theirs in zip(found["the stage"]["seconds"], found["by hand"]["seconds"], strict=True)
    ]
    print(f"  the stage ÷ by hand, round by round: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    metrics = found["the stage"]["metrics"]
    print(f"  of the stage, converting {metrics['seconds']:.1f} s; KL {metrics['mean_kl']:.1e}")
    return found


def our_quantize(work: Path, out: Path, *settings: str) -> dict[str, Any]:
    made = work / "bench"
    inputs = quantize.Inputs(
        made / "convert" / convert.OUTPUT,
        made / "imatrix" / imatrix.OUTPUT,
        work / "train.jsonl",
        work / "held_out.jsonl",
    )
    llama = llama_cpp.find(host_cmake())
    return quantize.run(Quantize(**json.loads(settings[0])), inputs, llama=llama, out=out, report=Lines())


def make_imatrix(work: Path, out: Path) -> dict[str, Any]:
    return imatrix.run(
        Imatrix(),
        gguf=work / "bench" / "convert" / convert.OUTPUT,
        rows=work / "train.jsonl",
        tokenizer=work / "model",
        llama=llama_cpp.find(host_cmake()),
        out=out,
        report=Silent(),
    )


CHILDREN = {function.__name__: function for function in (our_quantize, make_imatrix)}


def run_child(function: str, work: Path, out: Path, rest: Sequence[str]) -> None:
    out.mkdir(parents=True)
    started = time.monotonic()
    metrics = CHILDREN[function](work, out, *rest)
    seconds = time.monotonic() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "metrics": metrics}))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--search-tokens", type=int, default=Quantize().search_tokens)
    parser.add_argument("--search-trials", type=int, default=Quantize().search_trials)
    parser.add_argument("--rounds", type=int, default=5, help="of llama-bench")
    parser.add_argument("--convert-only", action="store_true")
    parser.add_argument("--convert-rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    work, made = given.work, given.work / "bench"
    shutil.rmtree(made, ignore_errors=True)
    llama = llama_cpp.find(host_cmake())
    made.mkdir(parents=True)
    converted = conversions(work, made, given.convert_rounds)
    if given.convert_only:
        return
    matrix = child("make_imatrix", str(work), str(made / "imatrix"))
    print(f"imatrix            {matrix['seconds']:6.1f} s  {matrix['metrics']['summary']}")
    stock = child("our_quantize", str(work), str(made / "stock"), "{}")
    plain = made / "by_hand.gguf"
    argv = [str(llama.program("llama-quantize")), "--imatrix", imatrix.OUTPUT, str(made / "convert" / convert.OUTPUT)]
    started = time.monotonic()
    subprocess.run([*argv, str(plain), "Q4_K_M"], cwd=made / "imatrix", check=True, capture_output=True)
    seconds = time.monotonic() - started
    same = plain.read_bytes() == (made / "stock" / quantize.OUTPUT).read_bytes()
    bytes_are = "equal" if same else "DIFFERENT"
    print(f"quantize, by hand  {seconds:6.1f} s, the stage {stock['seconds']:.1f} s, bytes {bytes_are}")
    settings = {
        "allocation": "error-aware",
        "search_tokens": given.search_tokens,
        "search_trials": given.search_trials,
    }
    aware = child("our_quantize", str(work), str(made / "error-aware"), json.dumps(settings))
    allocation = aware["metrics"]["allocation"]
    print(f"error-aware        {aware['seconds']:6.1f} s  {aware['peak_bytes'] / 2**20:7.0f} MiB")
    print(f"  {aware['metrics']['summary']}")
    change = allocation["held_out"]["change"]
    print(f"  KL {change['share']:+.1%}, {change['difference']:+.5f} [{change['low']:+.5f}, {change['high']:+.5f}]")
    for name, form in allocation["held_out"]["forms"].items():
        print(
            f"  {name:18} {form['file_bytes']:>12,} bytes  {form['bits_per_weight']:6.3f} bits  KL {form['kl']:.5f}  "
            f"p99 {form['kl_p99']:.4f}  same top {form['same_top']:.2%}  perplexity {form['perplexity']:.4f}  "
            f"F1 {form['answer_f1']:.3f}"
        )
    searched = made / "searched.gguf"
    if allocation["taken"]:
        searched = made / "error-aware" / quantize.OUTPUT
    else:
        plan = ["--tensor-type-file", str(made / "error-aware" / quantize.PLAN)]
        subprocess.run(
            [argv[0], *plan, *argv[1:], str(searched), "Q4_K_M"], cwd=made / "imatrix", check=True, capture_output=True
        )
    speeds = speed.in_turns(
        {"stock": made / "stock" / quantize.OUTPUT, "error-aware": searched},
        llama=llama, rounds=given.rounds, prompt_tokens=256, new_tokens=64, log=made / "speed.log", report=Silent(),
    )  # fmt: skip
    for kind in ("prefill", "decode"):
        for name, found in speed.summary(speeds, kind, against="stock").items():
            print(
                f"{kind:8} {name:12} {found['median']:8.1f} tokens/s ({found['least']:.1f} to {found['most']:.1f}), "
                f"× {found['ratio']:.3f}"
            )
    pictures.write(allocation, work)
    if given.json:
        found = {
            "convert": converted,
            "stock": stock,
            "aware": aware,
            "speeds": speeds,
            "same_bytes": same,
        }
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
