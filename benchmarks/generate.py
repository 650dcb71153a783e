"""Answers a second by the toolchain's batched decoding, against `model.generate` on one question at a time.

The same checkpoint, prompts, number type and greedy decoding; both start warm. Prints one JSON object with the
conditions.

    python benchmarks/generate.py work/teacher/*/checkpoint --data recipes/data/technical/train.jsonl --device cuda
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from toolchain.data.formats import read_examples
from toolchain.recipe import Generate
from toolchain.student import load, precision
from toolchain.teacher.decode import Decoded, Sampling, decode
from toolchain.teacher.generate import render
from toolchain.teacher.journal import Prompt


def one_by_one(model: Any, prompts: Sequence[Prompt], stops: Sequence[int]) -> list[tuple[int, ...]]:
    """What a plain loop does."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], device=model.device)
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=prompt.limit,
                do_sample=False,
                eos_token_id=list(stops),
                pad_token_id=stops[0],
            )
        found.append(tuple(whole[0, ids.shape[1] :].tolist()))
    return found


def in_batches(model: Any, prompts: Sequence[Prompt], stops: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """What `generate` does, the journal aside."""
    order = sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.number))
    found: dict[int, Decoded] = {}
    for at in range(0, len(order), size):
        batch = order[at : at + size]
        decoded = decode(model, batch, stops=stops, choose=Sampling(Generate()))
        found |= {prompt.number: answer for prompt, answer in zip(batch, decoded, strict=True)}
    return [found[prompt.number][0] for prompt in prompts]


def timed(run: Callable[[], list[tuple[int, ...]]], device: torch.device) -> tuple[float, list[tuple[int, ...]]]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    answers = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default=str(precision.pick_device()))
    parser.add_argument("--questions", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=Generate().max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=Generate().batch_size)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = precision.decoding_type(device)
    model, tokenizer = load.load_model(options.checkpoint, dtype=dtype, device=device)
    stops = load.stop_ids(options.checkpoint, tokenizer)
    examples = read_examples(options.data, format="auto", need_answer=False, system=None)[: options.questions]
    prompts = [
        Prompt(
            at,
            example.where,
            example.messages,
            render(tokenizer, example.messages, where=example.where),
            options.max_new_tokens,
            at,
        )
        for at, example in enumerate(examples)
    ]
    one_by_one(model, prompts[:2], stops)
    in_batches(model, prompts[: options.batch_size], stops, options.batch_size)
    samples: dict[str, list[float]] = {"one_by_one": [], "in_batches": []}
    answers: dict[str, list[tuple[int, ...]]] = {}
    # Interleaved, so that what else the machine does falls on both.
    for _ in range(options.repetitions):
        for name, run in (
            ("one_by_one", lambda: one_by_one(model, prompts, stops)),
            ("in_batches", lambda: in_batches(model, prompts, stops, options.batch_size)),
        ):
            seconds, answers[name] = timed(run, device)
            samples[name].append(len(prompts) / seconds)
    ratios = [fast / slow for fast, slow in zip(samples["in_batches"], samples["one_by_one"], strict=True)]
    pairs = list(zip(answers["one_by_one"], answers["in_batches"], strict=True))
    result = {
        "answers_per_second": samples,
        "ratio": ratios,
        "equal_answers": sum(one == other for one, other in pairs),
        "answer_tokens": {name: sum(map(len, found)) for name, found in answers.items()},
        "questions": len(prompts),
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
