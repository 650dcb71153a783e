"""Training tokens/s: distillation from cached logits, against TRL's trainers with the teacher in memory.

Run from the repository: `python -m benchmarks.live_teacher --help`. All ways train the same student with the same LoRA,
rows, batch size, optimiser and precision, in one process on one device, one after the other. A token counts where it is
prompt or answer of a batch that was trained on, and never as padding. The first steps are not counted. The
cost of capturing the logits is given beside it, since it is paid once and not per epoch.
"""

import argparse
import gc
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import toolchain.offline  # noqa: F401 - before any Hugging Face import
from tests.tiny import make_tiny_checkpoint
from toolchain.data.rows import Message, Row, write_rows
from toolchain.recipe import Distill
from toolchain.reporter import Silent

WARM_UP = 2
EPOCHS = 3
"""Epochs over which the cost of the capture is spread in `…_with_capture`: the default of distill.epochs."""


def main() -> None:
    """Print one JSON object."""
    options = _options()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="live-teacher-") as folder:
        bench = Bench(options, Path(folder))
        ways: dict[str, Callable[[Path], dict[str, Any]]] = {
            "cached": bench.cached,
            "gkd_off_policy": lambda _: bench.gkd(student_share=0.0),
            "gkd_on_policy": lambda _: bench.gkd(student_share=1.0),
            "distillation_trainer": lambda _: bench.distillation_trainer(),
        }
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in options.ways or ways}
        for number in range(options.rounds):
            for name, found in samples.items():
                out = Path(folder) / f"{name}-{number}"
                out.mkdir()
                found.append(bench.measured(partial(ways[name], out)))
                print(f"{name}: {found[-1]}", file=sys.stderr)
        result = {"conditions": bench.conditions(), "ways": samples, "ratios": _ratios(samples)}
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = "checkpoint folder, or hidden,layers,vocabulary of a Llama with random weights and a tiny tokenizer"
    parser.add_argument("--teacher", default="128,4,512", help=model)
    parser.add_argument("--student", default="64,2,512", help=model)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto: the GPU where there is one")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of the longest prompt; the shortest has half")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of the longest answer; the shortest has half")
    parser.add_argument("--rounds", type=int, default=1, help="how often each way runs, in turn")
    parser.add_argument("--ways", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def _ratios(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Tokens/s of the cached way over that of each other, medians of the rounds."""
    medians = {}
    for name, rounds in samples.items():
        rates = sorted(found["tokens_per_second"] for found in rounds if "tokens_per_second" in found)
        if rates:
            medians[name] = rates[len(rates) // 2]
    cached = medians.pop("cached", None)
    return {} if cached is None else {f"cached / {name}": cached / rate for name, rate in medians.items()}


class Clock(Silent):
    """When each optimiser step ended: as a Reporter for our trainer, and through `tick` for others."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self._steps = False

    def tick(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at_s.append(time.perf_counter())

    def start(self, label: str, *, total: float | None, unit: str) -> Any:
        clock = self

        class Task:
            def advance(self, amount: float = 1.0) -> None:
                if unit == "step" and amount:
                    clock.tick()

        return Task()

    def rate(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Tokens/s behind the warm-up: N steps span the time from the end of the one before to the end of the last."""
        assert len(tokens) == len(self.at_s) > WARM_UP, (len(tokens), len(self.at_s))
        seconds = self.at_s[-1] - self.at_s[WARM_UP - 1]
        return {
            "tokens_per_second": sum(tokens[WARM_UP:]) / seconds,
            "tokens": sum(tokens[WARM_UP:]),
            "seconds": seconds,
            "step_seconds": [later - earlier for earlier, later in zip(self.at_s, self.at_s[1:], strict=False)],
        }


class Bench:
    """The models, rows and settings that all ways share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        from toolchain.student import distill, load, precision

        self.options, self.folder = options, folder
        self.device = precision.pick_device()
        self.dtype = precision.weights_type(self.device)
        self.teacher = self._model(options.teacher, "teacher", seed=0)
        self.student = self._model(options.student, "student", seed=1)
        self.settings = Distill(
            ce_weight=0.0,
            kl_weight=1.0,
            temperature=1.0,
            optimizer="adamw",
            engine="transformers",
            epochs=1.0,
            batch_size=options.batch_size,
            precision=options.precision,
            log_every_steps=10**6,
            checkpoint_every_steps=10**6,
        )
        self.autocast = precision.autocast_type(options.precision, self.device)
        self.tokenizer = load.load_tokenizer(self.student)
        self.rows = list(self._rows())
        self.longest = max(len(row.token_ids) for row in self.rows)
        write_rows(folder / "rows.jsonl", self.rows)
        self.batches = distill.plan(self.rows, self.settings, seed=0)
        assert len(self.batches) == options.steps > WARM_UP

    def conditions(self) -> dict[str, Any]:
        import torch
        import transformers
        import trl

        on_gpu = self.device.type == "cuda"
        options = {name: str(value) for name, value in vars(self.options).items() if name != "json"}
        return {
            **options,
            "device": torch.cuda.get_device_name(self.device) if on_gpu else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "weights": str(self.dtype).removeprefix("torch."),
            "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
            "lora_rank": self.settings.lora_rank,
            "lora_targets": list(self.settings.lora_targets),
            "rows": len(self.rows),
            "warm_up_steps": WARM_UP,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        }

    def measured(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `run` gives, and the GPU's peak memory; running out of memory is a result too."""
        import torch

        on_gpu = self.device.type == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = run()
        except torch.OutOfMemoryError as error:
            return {"out_of_memory": str(error).splitlines()[0]}
        return {**found, "peak_gpu_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}

    # -- the ways

    def cached(self, out: Path) -> dict[str, Any]:
        """`vocabulary` and `capture`, then `distill`, as a run of a recipe does them."""
        rows = self.folder / "rows.jsonl"
        models = {"teacher": self.teacher, "student": self.student}
        self._stage("vocabulary", {"method": "logits", "on_policy": False}, models, out)
        started = time.perf_counter()
        self._stage(
            "capture",
            {"capture": {}, "temperatures": [self.settings.temperature], "load_in_4bit": False, "cmake": None},
            {"teacher": self.teacher, "vocabulary": out / "vocabulary" / "vocabulary.json", "rows": rows},
            out,
        )
        captured_s = time.perf_counter() - started
        clock = Clock()
        self._stage(
            "distill",
            {"distill": self.settings.model_dump(mode="json"), "max_length": self.longest, "seed": 0},
            {"base": self.student, "rows": rows, "logits": out / "capture"},
            out,
            clock,
        )
        tokens = [sum(len(row.token_ids) for row in batch) for batch in self.batches]
        found = clock.rate(tokens)
        all_tokens = sum(len(row.token_ids) for row in self.rows)
        per_token_s = 1 / found["tokens_per_second"] + captured_s / all_tokens / EPOCHS
        shutil.rmtree(out)
        return {
            **found,
            "capture_seconds": captured_s,
            "capture_tokens_per_second": all_tokens / captured_s,
            f"tokens_per_second_with_capture_over_{EPOCHS}_epochs": 1 / per_token_s,
        }

    def _stage(
        self, name: str, settings: dict[str, Any], inputs: dict[str, Path], out: Path, report: Silent | None = None
    ) -> None:
        from toolchain.pipeline import stage_called

        (out / name).mkdir()
        stage_called(name).run_job(settings, inputs, out / name, report or Silent())

    def gkd(self, *, student_share: float) -> dict[str, Any]:
        """TRL's GKDTrainer as it comes, fed with the same batches."""
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        from toolchain.student.on_policy import Collator

        arguments = GKDConfig(
            **self._arguments(batch_size=1),  # one item of the data set is one batch
            train_sampling_strategy="sequential",
            lmbda=student_share,
            beta=0.0,
            temperature=1.0,
            max_new_tokens=self.options.answer_tokens,
            max_length=None,
        )
        trainer = self._counting(GKDTrainer)(
            args=arguments,
            data_collator=Collator(self.batches, self.tokenizer.pad_token_id),
            train_dataset=Dataset.from_dict({"batch": list(range(len(self.batches)))}),
            **self._models(),
        )
        return self._train(trainer)

    def distillation_trainer(self) -> dict[str, Any]:
        """TRL's DistillationTrainer, which is on-policy only and renders the prompts itself."""
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        arguments = DistillationConfig(
            **self._arguments(batch_size=self.options.batch_size),
            beta=0.0,
            temperature=1.0,
            max_completion_length=self.options.answer_tokens,
            max_steps=len(self.batches),
        )
        prompts = [[turn.as_dict() for turn in row.messages] for row in self.rows]
        trainer = self._counting(DistillationTrainer)(
            args=arguments, train_dataset=Dataset.from_dict({"prompt": prompts}), **self._models()
        )
        return self._train(trainer)

    def _arguments(self, *, batch_size: int) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "trl"),
            "per_device_train_batch_size": batch_size,
            "num_train_epochs": 1,
            "learning_rate": self.settings.learning_rate,
            "gradient_checkpointing": False,
            "bf16": self.autocast is not None,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
        }

    def _models(self) -> dict[str, Any]:
        from toolchain.student import load
        from toolchain.student.engine import load_for_training

        tokenizer = load.load_tokenizer(self.student)
        tokenizer.padding_side = "left"
        teacher, _ = load.load_model(self.teacher, dtype=self.dtype, device=self.device)
        student = load_for_training(
            self.settings, "transformers", self.student, max_length=self.longest, seed=0, device=self.device
        )
        return {"model": student, "teacher_model": teacher, "processing_class": tokenizer}

    def _counting(self, kind: Any) -> Any:
        class Counting(kind):  # type: ignore[misc]
            """Notes the tokens of each batch when its loss is computed."""

            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                names = ("attention_mask",) if "attention_mask" in inputs else ("prompt_mask", "completion_mask")
                self.counts.append(sum(int(inputs[name].sum()) for name in names))
                return super().compute_loss(model, inputs, *args, **kwargs)

            def _send_telemetry(self) -> None:
                """Nothing is reported."""

        return Counting

    def _train(self, trainer: Any) -> dict[str, Any]:
        from transformers import PrinterCallback, TrainerCallback, set_seed

        clock = Clock()

        class Ticking(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        trainer.counts = []
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Ticking())
        set_seed(0)
        trainer.train()
        return clock.rate(trainer.counts)

    # -- models and rows

    def _model(self, given: str, name: str, *, seed: int) -> Path:
        shape = given.split(",")
        if len(shape) != 3 or not all(part.isdigit() for part in shape):
            return Path(given)
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, layers, vocabulary = map(int, shape)
        path = make_tiny_checkpoint(self.folder / name)
        heads = max(hidden // 64, 1)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(count for count in range(1, max(heads // 4, 1) + 1) if heads % count == 0),
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            dtype=self.dtype,
        )
        torch.manual_seed(seed)
        with self.device:
            LlamaForCausalLM(config).to(self.dtype).save_pretrained(path)
        return path

    def _rows(self) -> Iterator[Row]:
        """Prompts of real text, since their rendering is checked; answers of random tokens take as long."""
        from toolchain.teacher.generate import render

        chance = random.Random(0)
        ordinary = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        for number in range(self.options.steps * self.options.batch_size):
            wanted = chance.randint(self.options.prompt_tokens // 2, self.options.prompt_tokens)
            text = f"Question {number}."
            ids = fitting = render(self.tokenizer, (Message("user", text),), where="row")
            messages = (Message("user", text),)
            while len(ids) <= wanted:
                fitting, messages = ids, (Message("user", text),)
                text += chance.choice((" The", " files", " of", " a", " command", " line", " 7"))
                ids = render(self.tokenizer, (Message("user", text),), where="row")
            size = chance.randint(max(self.options.answer_tokens // 2, 1), self.options.answer_tokens)
            answer = (*chance.choices(ordinary, k=size - 1), self.tokenizer.eos_token_id)
            yield Row(f"row-{number}", messages, "-", fitting, answer, "stop")


if __name__ == "__main__":
    main()
