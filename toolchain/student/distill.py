"""Student + rows + cached teacher logits → LoRA adapter. Writes adapter/ and log.jsonl.

Checkpoints go to resume/; a killed run goes on from the newest one that is whole, and on a CPU ends with the same bytes
as a run that was not killed: the order of the data is planned ahead, and no number depends on when it was computed.
"""

import json
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from toolchain.data.rows import Row, read_rows
from toolchain.errors import ArtifactError, DataError, ModelError, RecipeError
from toolchain.recipe import Distill
from toolchain.reporter import Reporter, Task, bar
from toolchain.student import load, precision, vocabulary
from toolchain.student.losses import Teacher, distillation_loss
from toolchain.teacher.generate import render
from toolchain.teacher.logit_cache import Reader

IGNORE = -100
_WHOLE = "whole"
_WINDOW = 16
"""Batches within which rows are sorted by length: less padding, and still another order in each epoch."""
_CHUNK = {"cpu": 128, "cuda": 1024}
"""Answer positions per use of the head. On a CPU, logits of this many still lie in memory that malloc keeps."""


def run(
    settings: Distill,
    *,
    seed: int,
    base: Path,
    rows: Path,
    logits: Path | None,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Train. `base` is a checkpoint folder, `logits` a cache (None only with kl_weight 0).

    Raises DataError, ModelError (a loss that is not finite: the step is named), RecipeError, and ArtifactError for a
    cache of other rows, tokens or temperatures.
    """
    examples = read_rows(rows)
    device = precision.pick_device()
    autocast = precision.autocast_type(settings.precision, device)
    set_seed(seed)
    model, tokenizer = load.load_model(base, dtype=precision.weights_type(device), device=device)
    _check_rows(examples, tokenizer, rows)
    cache = None
    if settings.kl_weight > 0:
        if logits is None:
            raise RecipeError("distill.kl_weight is above 0 and there are no captured logits")
        cache = Reader(logits)
        cache.expect(
            tokenizer=vocabulary.tokenizer_digest(tokenizer, ids=cache.source.vocabulary),
            template=vocabulary.template_digest(tokenizer) or "",
        )
        if cache.source.vocabulary > model.config.vocab_size:
            raise ArtifactError(
                f"{logits}: probabilities over {cache.source.vocabulary} ids, {base} has {model.config.vocab_size}"
            )
    model = _with_lora(model, settings)
    batches = plan(examples, settings, seed=seed)
    steps = math.ceil(len(batches) / settings.gradient_accumulation)
    checkpoints = out / "resume"
    checkpoints.mkdir(exist_ok=True)
    newest = newest_whole(checkpoints)
    done = int(newest.name.rpartition("-")[2]) if newest else 0

    with bar(report, "distil", total=steps, unit="step") as task:
        task.advance(done)
        trainer = _Trainer(
            model=model,
            args=_arguments(settings, checkpoints, steps=steps, seed=seed, device=device),
            train_dataset=_Batches(batches),
            data_collator=_Collator(cache, settings.temperature),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.prepare(settings, load.head_of(model, vocabulary=cache.source.vocabulary if cache else None), autocast)
        trainer.follow(report, task, steps)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        seconds = time.perf_counter() - started
    history = [entry for entry in trainer.state.log_history if "ce" in entry]
    with (out / "log.jsonl").open("w", encoding="utf-8") as file:
        for entry in history:
            file.write(json.dumps({name: entry[name] for name in _LOGGED}) + "\n")
    save_adapter(model, out / "adapter")
    first, last = ({name: entry[name] for name in ("loss", "ce", "kl")} for entry in (history[0], history[-1]))
    speed = trainer.tokens_seen / seconds if steps > done else None
    return {
        "summary": f"loss {first['loss']:.3f} → {last['loss']:.3f} in {steps} steps"
        + (f", {speed:.0f} tokens/s" if speed else ""),
        "steps": steps,
        "steps_resumed": done,
        "rows": len(examples),
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "first": first,
        "last": last,
        "seconds": seconds,
        "tokens": trainer.tokens_seen,
        "tokens_per_second": speed,
        "peak_memory_bytes": _peak_memory(device),
        "engine": "transformers",
        "device": str(device),
        "precision": "float32" if autocast is None else str(autocast).removeprefix("torch."),
    }


def plan(rows: Sequence[Row], settings: Distill, *, seed: int) -> list[list[Row]]:
    """The batches of all epochs, in the order of training: from rows, settings and seed alone."""
    size = settings.batch_size
    per_epoch = math.ceil(len(rows) / size)
    wanted = max(1, round(settings.epochs * per_epoch))
    chosen: list[list[Row]] = []
    for epoch in range(math.ceil(wanted / per_epoch)):
        order = random.Random(f"{seed}/{epoch}")  # noqa: S311 - a shuffle, no secret
        shuffled = order.sample(rows, len(rows))
        for start in range(0, len(shuffled), size * _WINDOW):
            window = sorted(shuffled[start : start + size * _WINDOW], key=lambda row: len(row.token_ids))
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            order.shuffle(batches)
            chosen += batches
    return chosen[:wanted]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; the others are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found:
        if not (path / _WHOLE).exists():
            shutil.rmtree(path)
    return next((path for path in reversed(found) if path.exists()), None)


def save_adapter(model: Any, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, the latter without this host's paths and in a fixed order."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = None
    # PEFT keeps the names in a set, whose order changes from process to process.
    for name, value in config.items():
        if name in ("target_modules", "modules_to_save", "exclude_modules") and isinstance(value, list):
            config[name] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_rows(rows: Sequence[Row], tokenizer: Any, path: Path) -> None:
    if not rows:
        raise DataError(f"{path}: no rows")
    for row in rows:
        if not row.answer_ids or not row.prompt_ids:
            raise DataError(f"{path}: row {row.id} has no answer token to learn from", hint="run `generate` again")
        if render(tokenizer, row.messages, where=row.id) != row.prompt_ids:
            raise ModelError(
                f"row {row.id}: the student's tokenizer and chat template do not give the tokens in {path}",
                hint="choose a student of the teacher's family, with the teacher's chat template",
            )


def _with_lora(model: Any, settings: Distill) -> Any:
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    lost = [wanted for wanted in settings.lora_targets if not any(n.rpartition(".")[2] == wanted for n in names)]
    if lost:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise RecipeError(f"distill.lora_targets: the student has no layer '{lost[0]}'", hint=f"it has: {known}")
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=sorted(settings.lora_targets),
        task_type="CAUSAL_LM",
    )
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config).train()


def _arguments(settings: Distill, folder: Path, *, steps: int, seed: int, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one item of _Batches is one batch
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_share * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    # One process trains on one GPU: DataParallel would split batches that are not made of rows alone.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Batches(Dataset[list[Row]]):
    """The plan; read in order."""

    def __init__(self, batches: Sequence[list[Row]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: int) -> list[Row]:
        return self.batches[at]


class _Collator:
    """One planned batch → tensors. Labels stand where they are predicted, so nothing is shifted later."""

    def __init__(self, cache: Reader | None, temperature: float) -> None:
        self.cache = cache
        self.temperature = temperature

    def __call__(self, batches: Sequence[list[Row]]) -> dict[str, torch.Tensor]:
        (rows,) = batches
        batch = load.pad_rows(rows, pad_id=0)
        labels = torch.full_like(batch.input_ids, IGNORE)
        labels[batch.answers] = torch.tensor([token for row in rows for token in row.answer_ids])
        tensors = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}
        # By this name the Trainer takes the count of answer tokens as it is; under "labels" it would drop a column.
        tensors["shift_labels"] = labels
        if self.cache is not None:
            pairs = [self.cache.at_temperature(row, self.temperature) for row in rows]
            width = max(ids.shape[1] for ids, _ in pairs)
            tensors["teacher_ids"] = torch.from_numpy(_stack([ids for ids, _ in pairs], width, 0))
            tensors["teacher_logprobs"] = torch.from_numpy(_stack([logp for _, logp in pairs], width, -np.inf))
        return tensors


def _stack(parts: Sequence[Any], width: int, fill: float) -> Any:
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts])


_LOGGED = ("step", "loss", "ce", "kl", "learning_rate", "grad_norm", "tokens")


class _Trainer(Trainer):  # type: ignore[misc]
    """Transformers' loop with our loss, our log and checkpoints that say when they are whole."""

    def prepare(self, settings: Distill, head: load.Head, autocast: torch.dtype | None) -> None:
        self.settings = settings
        self.head = head
        self.autocast_type = autocast
        self.model_accepts_loss_kwargs = True  # else the loss, already per token, is divided once more
        self.tokens_seen = 0
        self._sums = {"loss": 0.0, "ce": 0.0, "kl": 0.0, "tokens": 0}

    def follow(self, report: Reporter, task: Task, steps: int) -> None:
        self.report, self.task, self.steps = report, task, steps
        self._since = (time.perf_counter(), 0)

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        labels = inputs["labels"]
        live = labels != IGNORE
        tokens = int(live.sum())
        assert num_items_in_batch is not None
        device = labels.device.type
        with torch.autocast(device, dtype=self.autocast_type, enabled=self.autocast_type is not None):
            hidden = load.backbone(self.accelerator.unwrap_model(model))(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[live]
            teacher = Teacher(inputs["teacher_ids"], inputs["teacher_logprobs"]) if "teacher_ids" in inputs else None
            loss = distillation_loss(
                hidden,
                self.head,
                labels[live],
                teacher,
                weight=self.head.matrix,
                temperature=self.settings.temperature,
                ce_weight=self.settings.ce_weight,
                kl_weight=self.settings.kl_weight,
                tokens=float(num_items_in_batch),
                chunk=_CHUNK[device],
            )
        value = float(loss.total.detach())
        if not math.isfinite(value):
            raise ModelError(
                f"the loss is {value} at step {self.state.global_step + 1}: training stopped, nothing of it was kept",
                hint="lower distill.learning_rate, or set distill.precision = 'float32'",
            )
        for name, part in (("loss", value), ("ce", float(loss.ce)), ("kl", float(loss.kl)), ("tokens", tokens)):
            self._sums[name] += part
        self.tokens_seen += int(inputs["attention_mask"].sum())
        return loss.total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called once per step, and once at the end with figures of time, which the log leaves out."""
        if "loss" in logs:
            if not math.isfinite(logs["grad_norm"]):
                raise ModelError(
                    f"the gradient is {logs['grad_norm']} at step {self.state.global_step}",
                    hint="lower distill.learning_rate, or set distill.precision = 'float32'",
                )
            logs |= self._sums
            self._sums = {"loss": 0.0, "ce": 0.0, "kl": 0.0, "tokens": 0}
            self.task.advance()
            step = self.state.global_step
            if step % self.settings.log_every_steps == 0 or step in (1, self.steps):
                now, seen = time.perf_counter(), self.tokens_seen
                speed = (seen - self._since[1]) / (now - self._since[0])
                self._since = (now, seen)
                self.report.line(
                    f"step {step}/{self.steps}  loss {logs['loss']:.4f}  ce {logs['ce']:.4f}  kl {logs['kl']:.4f}  "
                    f"lr {logs['learning_rate']:.2e}  {speed:.0f} tok/s"
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / _WHOLE).touch()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
