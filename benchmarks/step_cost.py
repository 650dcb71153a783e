"""What a training step costs: plain fine-tuning against distilling from the cache, Unsloth against Transformers + PEFT.

    python benchmarks/step_cost.py WORK [--tokens 2048] [--rows 1] [--steps 30] [--shape 1b|tiny] [--json FILE]

Needs an NVIDIA GPU for --shape 1b: a Llama of 1.24 B random parameters with 128,256 ids, made on the spot. Every run is
`distill` itself on the same rows in the same order. One process an engine and width measures its losses in turns, and
one process measures at a time; seconds are the median over the steps of its turns, memory is the highest peak of the
GPU's allocator (of the process, on a CPU). What the model answers is random, what a step costs is not.
"""

import argparse
import fcntl
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.tiny import make_tiny_checkpoint
from toolchain.recipe import Capture, Distill
from toolchain.reporter import Silent
from toolchain.worker import run_in_worker

SHAPES: dict[str, dict[str, int]] = {
    "1b": {
        "vocabulary": 128_256, "width": 2048, "layers": 16, "intermediate": 8192, "heads": 32, "key_value_heads": 8,
    },
    "tiny": {"vocabulary": 2048, "width": 64, "layers": 2, "intermediate": 128, "heads": 4, "key_value_heads": 2},
}  # fmt: skip
WORDS = ("the", "command", "lists", "copies", "moves", "sorts", "counts", "prints", "every", "file", "branch", "port")


def make_model(folder: Path, shape: str) -> Path:
    """A random Llama with the tests' tokenizer; on a GPU in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    made = make_tiny_checkpoint(folder)
    size = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=size["vocabulary"], hidden_size=size["width"], intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"],
        num_key_value_heads=size["key_value_heads"], tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    model.save_pretrained(made)
    return made


def make_rows(path: Path, model: Path, *, rows: int, tokens: int) -> None:
    """Rows of exactly `tokens` tokens, nearly all of them answer."""
    import random

    from toolchain.data.rows import Message, Row, write_rows
    from toolchain.student.load import load_tokenizer
    from toolchain.teacher.generate import render

    tokenizer = load_tokenizer(model)
    made = []
    for number in range(rows):
        order = random.Random(number)
        messages = (Message("user", f"Question {number}?"),)
        prompt = render(tokenizer, messages, where="row")
        answer = " ".join(order.choice(WORDS) for _ in range(tokens))
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"][: tokens - len(prompt) - 1]
        made.append(Row(f"row-{number}", messages, answer, prompt, (*ids, tokenizer.eos_token_id), "stop"))
    write_rows(path, made)


def stage(name: str, settings: dict[str, Any], inputs: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run a stage as `toolchain run` does, in a process of its own."""
    out.mkdir(parents=True)
    named = {key: str(path) for key, path in inputs.items()}
    job = {"stage": name, "settings": settings, "inputs": named, "out": str(out)}
    return run_in_worker(job, log=out.with_suffix(".log"), report=Silent())


def measure(given: argparse.Namespace) -> None:
    """The child: import the engine, say so, wait to be let, measure every loss in turns, print one line of JSON."""
    from toolchain.student.engine import choose

    engine = choose(given.engine)
    import gc

    import torch

    from toolchain.student import distill

    print("ready", flush=True)
    sys.stdin.readline()
    results: dict[str, dict[str, Any]] = {}
    for turn in range(given.turns):
        for loss in ("sft", *filter(None, given.divergences.split(","))):
            weights: dict[str, Any] = {"kl_weight": 0.0, "ce_weight": 1.0} if loss == "sft" else {"divergence": loss}
            settings = Distill(
                engine=engine, load_in_4bit=given.bits == "4", batch_size=given.rows, epochs=given.steps / 4,
                checkpoint_every_steps=10_000, log_every_steps=1000, **weights,
                gradient_checkpointing={"on": True, "off": False, "default": None}[given.checkpointing],
            )  # fmt: skip
            out = given.work / f"{engine}-{given.bits}-{loss}-{turn}"
            out.mkdir()
            before = 0
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                # What an earlier run of this process has left is not this one's.
                before = torch.cuda.memory_allocated()
            metrics = distill.run(
                settings, engine=engine, max_length=given.tokens, seed=0, base=given.work / "model",
                rows=given.work / "train.jsonl", logits=given.work / "cache" if settings.uses_logits else None, out=out,
                report=Silent(),
            )  # fmt: skip
            kept = ("engine_version", "optimizer", "gradient_checkpointing", "device", "precision", "steps")
            facts = {name: metrics[name] for name in kept}
            start = {"engine": engine, "bits": int(given.bits), "loss": loss, "seconds": [], "peak_memory_bytes": 0}
            entry = results.setdefault(loss, start | facts)
            entry["seconds"].append(metrics["seconds_per_step"])
            entry["peak_memory_bytes"] = max(entry["peak_memory_bytes"], metrics["peak_memory_bytes"] - before)
    print(json.dumps(list(results.values())), flush=True)


def run_children(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All children import at once; then they measure one after the other."""
    children = []
    for engine, bits in itertools.product(given.engines.split(","), given.widths.split(",")):
        argv = [sys.executable, __file__, str(given.work), "--engine", engine, "--bits", bits]
        for name in ("tokens", "rows", "steps", "divergences", "turns", "checkpointing"):
            argv += [f"--{name}", str(getattr(given, name))]
        log = (given.work / f"{engine}-{bits}.log").open("w")
        children.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True))
    for child in children:
        assert child.stdout is not None
        next(line for line in child.stdout if line == "ready\n")
    results: list[dict[str, Any]] = []
    lock = (given.lock or given.work / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    for child in children:
        last, _ = child.communicate("go\n")
        if child.returncode:
            raise SystemExit(f"a child failed; see the logs in {given.work}")
        results += json.loads(last.splitlines()[-1])
    lock.close()
    return results


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1, help="rows a step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--engines", default="unsloth,transformers")
    parser.add_argument("--widths", default="16,4")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--divergences", default="forward_kl")
    parser.add_argument("--lock", type=Path, help="file that keeps runs of this benchmark from measuring at one time")
    parser.add_argument("--checkpointing", choices=("default", "on", "off"), default="default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--bits", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        measure(given)
        return
    given.work.mkdir(parents=True)
    model = make_model(given.work / "model", given.shape)
    rows = given.work / "train.jsonl"
    make_rows(rows, model, rows=given.rows * 4, tokens=given.tokens)
    verdict = given.work / "vocabulary"
    pair = {"teacher": model, "student": model}
    stage("vocabulary", {"method": "logits", "on_policy": False}, pair, verdict)
    capture = Capture(top_k=given.top_k, batch_tokens=given.tokens * 4).model_dump(mode="json")
    settings = {"capture": capture, "temperatures": [2.0], "load_in_4bit": False, "cmake": None}
    inputs = {"teacher": model, "vocabulary": verdict / "vocabulary.json", "rows": rows}
    stage("capture", settings, inputs, given.work / "cache")
    results = run_children(given)
    for entry in results:
        seconds = statistics.median(entry["seconds"])
        plain = next(
            r for r in results if (r["engine"], r["bits"], r["loss"]) == (entry["engine"], entry["bits"], "sft")
        )
        entry["tokens_per_second"] = given.rows * given.tokens / seconds
        entry["time_ratio"] = seconds / statistics.median(plain["seconds"])
        entry["memory_ratio"] = entry["peak_memory_bytes"] / plain["peak_memory_bytes"]
        print(
            f"{entry['engine']:12} {entry['bits']:>2} bit  {entry['loss']:16} {entry['tokens_per_second']:9.0f} "
            f"tokens/s  {entry['peak_memory_bytes'] / 2**30:6.2f} GiB  time ×{entry['time_ratio']:.3f}"
            f"  memory ×{entry['memory_ratio']:.3f}"
        )
    if given.json:
        conditions = {name: str(value) for name, value in vars(given).items()}
        given.json.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
