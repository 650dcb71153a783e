"""How fast several GGUF files of one model run on this machine, by llama-bench, in turns so that noise falls on all."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import process
from toolchain.gguf.llama_cpp import LlamaCpp, physical_cores
from toolchain.reporter import Reporter, bar

Samples = dict[str, dict[str, list[float]]]
"""By file and then by kind ("prefill", "decode"): tokens/s, one for each round."""


def in_turns(
    files: Mapping[str, Path], *, llama: LlamaCpp, rounds: int, prompt_tokens: int, new_tokens: int, log: Path,
    report: Reporter,
) -> Samples:  # fmt: skip
    """Measure every file once in each round, on the physical cores; 0 tokens leave a kind out.

    Raises ExternalToolError.
    """
    program = llama.program("llama-bench")
    found: Samples = {name: {} for name in files}
    with bar(report, "speed", total=rounds * len(files), unit="run") as task:
        for _ in range(rounds):
            for name, path in files.items():

                def on_line(line: str, of: str = name) -> None:
                    if line.startswith("{"):
                        test = json.loads(line)
                        kind = "prefill" if test["n_prompt"] else "decode"
                        found[of].setdefault(kind, []).append(test["avg_ts"])

                argv = [str(program), "-m", str(path), "-p", str(prompt_tokens), "-n", str(new_tokens), "-r", "1"]
                argv += ["-o", "jsonl", "-t", str(physical_cores())]
                process.run(argv, log=log, on_line=on_line, hint=f"full output: {log}")
                task.advance()
    return found


def summary(samples: Samples, kind: str, *, against: str) -> dict[str, dict[str, Any]]:
    """For each file: median tokens/s, the least and the most, and the median of the rounds' ratios to `against`."""
    reference = samples[against][kind]
    return {
        name: {
            "median": statistics.median(found[kind]),
            "least": min(found[kind]),
            "most": max(found[kind]),
            "ratio": statistics.median(one / other for one, other in zip(found[kind], reference, strict=True)),
            "samples": found[kind],
        }
        for name, found in samples.items()
    }
