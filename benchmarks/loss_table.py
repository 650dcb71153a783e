"""Every loss × temperature × top-k on one teacher and student, against plain fine-tuning on the same rows and steps.

    toolchain run RECIPE --work WORK --until select
    python benchmarks/loss_table.py RECIPE WORK OUT [--processes 4] [--divergences …] [--temperatures …] [--top-ks …]

The recipe's teacher, student, rows and training settings; only the loss changes. Students are scored on the held-out
answers of the teacher: KL to the teacher at temperature 1 over the whole vocabulary, agreement of the likeliest token,
cross-entropy, and token F1 of its own greedy answers against the teacher's. Intervals are of the paired bootstrap over
the held-out questions, against plain fine-tuning (CE alone) with the same seed. Writes OUT/table.json and OUT/table.md.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolchain.recipe import Capture, Distill, Recipe, read_recipe
from toolchain.reporter import Silent

Job = tuple[str, float, int, int]
"""Divergence or "sft", temperature, top_k, seed."""
SCORES = ("kl", "agreement", "cross_entropy", "f1")


def part(work: Path, stage: str, name: str = "checkpoint") -> Path:
    """A file or folder of the one artifact of a stage."""
    from toolchain.student import load

    (artifact,) = (path for path in (work / stage).iterdir() if path.is_dir() and path.suffix != ".partial")
    return load.resolve(artifact) if name == "checkpoint" else artifact / name


def capture_all(recipe: Recipe, work: Path, out: Path, temperatures: list[float], top_ks: list[int]) -> None:
    """One cache for each top_k, for all temperatures, cut by top_k alone."""
    from toolchain.teacher import capture

    for top_k in top_ks:
        folder = out / f"cache-{top_k}"
        folder.mkdir(parents=True)
        settings = Capture(top_k=top_k, top_p=1.0, min_probability=0.0, value_bits=12, batch_tokens=16384)
        capture.run(
            settings, temperatures=temperatures, teacher=part(work, "teacher"), gguf=None, load_in_4bit=False,
            llama=None, vocabulary=part(work, "vocabulary", "vocabulary.json"),
            rows=part(work, "select", "train.jsonl"), out=folder, report=Silent(),
        )  # fmt: skip


class Scorer:
    """The teacher's distributions on the held-out answers, kept on the device, and what students are scored by."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        import torch

        from toolchain.data.rows import read_rows
        from toolchain.student import load, precision

        self.torch, self.load = torch, load
        self.device = precision.pick_device()
        self.rows = read_rows(part(work, "select", "held_out.jsonl"))
        self.base = part(work, "student")
        self.generate = recipe.generate.model_copy(update={"sampling_temperature": 0.0})
        self.tokenizer = load.load_tokenizer(self.base)
        self.stops = load.stop_ids(self.base, self.tokenizer)
        teacher, _ = load.load_model(part(work, "teacher"), dtype=torch.float32, device=self.device)
        self.teacher = self.logprobs(teacher)

    def logprobs(self, model: Any) -> list[Any]:
        """For each held-out row float32 [answer tokens, vocabulary]."""
        head, found = self.load.head_of(model), []
        with self.torch.inference_mode():
            for batch in self.load.batches_in_order(self.rows, batch_tokens=8192):
                found += [head(state).log_softmax(-1) for state in self.load.answer_states(model, batch)]
        return found

    def score(self, adapter: Path | None) -> dict[str, list[float]]:
        """By score, one value for each held-out question: means over its answer tokens."""
        from peft import PeftModel

        from toolchain.evaluate.answer_scores import token_f1
        from toolchain.teacher.decode import Sampling, decode, text_of
        from toolchain.teacher.journal import Prompt

        model, _ = self.load.load_model(self.base, dtype=self.torch.float32, device=self.device)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        scores: dict[str, list[float]] = {name: [] for name in SCORES}
        for row, p, q in zip(self.rows, self.teacher, self.logprobs(model), strict=True):
            scores["kl"].append(float((p.exp() * (p - q)).sum(-1).mean()))
            scores["agreement"].append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            labels = self.torch.tensor(row.answer_ids, device=q.device)
            scores["cross_entropy"].append(float(-q.gather(-1, labels[:, None]).mean()))
        limit = self.generate.max_new_tokens
        prompts = [Prompt(at, row.id, row.messages, row.prompt_ids, limit, 0) for at, row in enumerate(self.rows)]
        answers = decode(model, prompts, stops=self.stops, choose=Sampling(self.generate))
        for row, (ids, _) in zip(self.rows, answers, strict=True):
            scores["f1"].append(token_f1(text_of(self.tokenizer, ids), row.answer))
        return scores


def _worker(given: argparse.Namespace, jobs: "multiprocessing.Queue[Job | None]", done: Any) -> None:
    from toolchain.student import distill

    recipe = read_recipe(given.recipe)
    scorer = Scorer(recipe, given.work)
    while (job := jobs.get()) is not None:
        divergence, temperature, top_k, seed = job
        weights = recipe.distill.model_dump() | {"engine": "transformers", "checkpoint_every_steps": 100_000}
        if divergence == "sft":
            weights |= {"ce_weight": 1.0, "kl_weight": 0.0}
        else:
            weights |= {"divergence": divergence, "temperature": temperature}
        settings = Distill(**weights)
        out = given.out / f"{divergence}-{temperature}-{top_k}-{seed}"
        out.mkdir()
        started = time.perf_counter()
        logits = given.out / f"cache-{top_k}" if settings.uses_logits else None
        try:
            metrics = distill.run(
                settings, engine="transformers", max_length=recipe.data.max_length, seed=seed, base=scorer.base,
                rows=part(given.work, "select", "train.jsonl"), logits=logits, out=out, report=Silent(),
            )  # fmt: skip
            scores = scorer.score(out / "adapter")
            done.put((job, scores, {"last": metrics["last"], "seconds": time.perf_counter() - started}))
        except Exception as error:  # noqa: BLE001 - a negative result is one, too
            done.put((job, None, {"error": f"{type(error).__name__}: {error}"}))
    done.put(None)


def main() -> None:
    """Train, score, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--divergences", default="forward_kl,reverse_kl,jsd,skew_kl,skew_reverse_kl,tvd")
    parser.add_argument("--temperatures", default="1,2,4")
    parser.add_argument("--top-ks", default="16,64,256")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", help="of these, in this order: forward_kl:2:256,tvd:1:16")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    recipe = read_recipe(given.recipe)
    temperatures = [float(text) for text in given.temperatures.split(",")]
    top_ks, seeds = ([int(text) for text in texts.split(",")] for texts in (given.top_ks, given.seeds))
    capture_all(recipe, given.work, given.out, temperatures, top_ks)
    jobs: list[Job] = [("sft", 1.0, 0, seed) for seed in seeds]
    jobs += itertools.product(given.divergences.split(","), temperatures, top_ks, seeds)
    if given.only:
        wanted = [tuple(text.split(":")) for text in given.only.split(",")]
        jobs = [job for job in jobs if job[0] == "sft" or (job[0], f"{job[1]:g}", str(job[2])) in wanted]
        jobs.sort(key=lambda job: -1 if job[0] == "sft" else wanted.index((job[0], f"{job[1]:g}", str(job[2]))))
    context = multiprocessing.get_context("spawn")
    queue, done = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * given.processes]:
        queue.put(job)
    workers = [context.Process(target=_worker, args=(given, queue, done)) for _ in range(given.processes)]
    for worker in workers:
        worker.start()
    results: dict[Job, tuple[dict[str, list[float]] | None, dict[str, Any]]] = {}
    ended = 0
    while ended < len(workers):
        if (entry := done.get()) is None:
            ended += 1
            continue
        job, scores, facts = entry
        results[job] = (scores, facts)
        shown = {name: round(sum(values) / len(values), 4) for name, values in (scores or {}).items()}
        print(*job, shown or facts["error"], flush=True)
        write(given, results)


def write(given: argparse.Namespace, results: dict[Job, tuple[dict[str, list[float]] | None, dict[str, Any]]]) -> None:
    """table.json and table.md, from what there is so far."""
    from toolchain.evaluate.bootstrap import paired_differences

    entries = []
    for job in sorted(results):
        scores, facts = results[job]
        entry: dict[str, Any] = dict(zip(("divergence", "temperature", "top_k", "seed"), job, strict=True)) | facts
        if scores is not None:
            entry |= {name: sum(values) / len(values) for name, values in scores.items()}
            plain = results.get(("sft", 1.0, 0, job[3]), (None, {}))[0]
            if plain is not None and job[0] != "sft":
                found = paired_differences(
                    [plain[name] for name in SCORES], [scores[name] for name in SCORES], resamples=2000, seed=0
                )
                for name, difference in zip(SCORES, found, strict=True):
                    entry[f"{name}_against_sft"] = [difference.mean, difference.low, difference.high]
        entries.append(entry)
    (given.out / "table.json").write_text(json.dumps(entries, indent=1) + "\n")
    lines = [
        "| D | T | top-k | seed | KL | against CE alone | agreement | CE | F1 | against CE alone |",
        "|---" * 10 + "|",
    ]
    for entry in sorted(entries, key=lambda one: one.get("kl", 1e9)):
        if "kl" not in entry:
            lines.append(f"| {entry['divergence']} | {entry['temperature']:g} | {entry['top_k']} | {entry['seed']} "
                         f"| {entry['error']} |" + " |" * 5)  # fmt: skip
            continue
        gaps = {
            name: "" if f"{name}_against_sft" not in entry
            else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*entry[f"{name}_against_sft"])
            for name in ("kl", "f1")
        }  # fmt: skip
        where = "| | |" if entry["divergence"] == "sft" else f"| {entry['temperature']:g} | {entry['top_k']} |"
        lines.append(
            f"| {entry['divergence']} {where} {entry['seed']} | {entry['kl']:.3f} | {gaps['kl']} "
            f"| {entry['agreement']:.3f} | {entry['cross_entropy']:.3f} | {entry['f1']:.3f} | {gaps['f1']} |"
        )
    (given.out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
