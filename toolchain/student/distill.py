"""Student + rows + cached teacher logits → LoRA adapter. Writes adapter/ and log.jsonl.

Checkpoints go to resume/; a killed run goes on from the newest one that is whole, and on a CPU ends with the same bytes
as a run that was not killed: the order of the data is planned ahead, and no number depends on when it was computed.
Started by torchrun or `accelerate launch`, every process takes its share of each planned batch, so that one process or
eight make the same steps.
"""

import importlib.metadata
import json
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from toolchain.data.rows import Row, read_rows
from toolchain.errors import ArtifactError, DataError, HostError, ModelError, RecipeError
from toolchain.recipe import Distill
from toolchain.reporter import Reporter, Task, bar
from toolchain.student import checkpoint_files, load, parallel, precision, vocabulary
from toolchain.student.engine import Engine, checkpoints_activations, load_for_training, optimizer_name
from toolchain.student.losses import Loss, Objective, Teacher, distillation_loss, pick_chunk
from toolchain.teacher.generate import render
from toolchain.teacher.logit_cache import Reader

_WHOLE = "whole"
_WINDOW = 16
"""Batches within which rows are sorted by length: less padding, and still another order in each epoch."""


def run(
    settings: Distill,
    *,
    engine: Engine,
    max_length: int,
    seed: int,
    base: Path,
    rows: Path,
    logits: Path | None,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Train. `base` is a checkpoint folder, `logits` a cache (None when the method or weights do without).

    `engine` as engine.choose settled it. Raises DataError, ModelError (a loss that is not finite: the step is named),
    RecipeError, HostError (GPU memory: the setting is named, with the value that fits), and ArtifactError for a cache
    of other rows, tokens or temperatures.
    """
    examples = read_rows(rows)
    device = precision.pick_device()
    autocast = precision.autocast_type(settings.precision, device)
    set_seed(seed)
    tokenizer = load.load_tokenizer(base)
    _check_rows(examples, tokenizer, rows)
    cache = _open_cache(settings, logits, base, tokenizer, examples)
    batches = plan(examples, settings, seed=seed)
    model = load_for_training(settings, engine, base, max_length=max_length, seed=seed, device=device)
    step = _Step(model, settings, autocast, None if cache is None else cache.source.vocabulary)
    collate = _Collator(cache, settings.temperature, step.head.vocabulary)
    if device.type == "cuda":
        _check_memory(step, collate, batches, settings)
        set_seed(seed)
    return {
        **train(step, collate, batches, seed=seed, device=device, out=out, report=report),
        "rows": len(examples),
        "peak_memory_bytes": _peak_memory(device),
        "engine": engine,
        "engine_version": importlib.metadata.version(engine),
        "load_in_4bit": settings.load_in_4bit,
        "optimizer": optimizer_name(settings, device),
        "gradient_checkpointing": checkpoints_activations(settings, engine),
    }


def train(
    step: "_Step",
    collate: "_Collator",
    batches: Sequence[list[Row]],
    *,
    seed: int,
    device: torch.device,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Make the planned steps, from the newest whole checkpoint on; write log.jsonl and adapter/. Returns figures."""
    settings, model = step.settings, step.model
    steps = math.ceil(len(batches) / settings.gradient_accumulation)
    checkpoints = out / "resume"
    checkpoints.mkdir(exist_ok=True)
    arguments = _arguments(settings, checkpoints, steps=steps, seed=seed, device=device)
    with arguments.main_process_first(local=False):
        newest = newest_whole(checkpoints)
    done = int(newest.name.rpartition("-")[2]) if newest else 0

    with bar(report, "distil", total=steps, unit="step") as task:
        task.advance(done)
        trainer = _Trainer(model=step.as_model(), args=arguments, train_dataset=batches, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.follow(step, report, task, steps)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        seconds = time.perf_counter() - started
    history = [entry for entry in trainer.state.log_history if "ce" in entry]
    if parallel.rank() == 0:
        with (out / "log.jsonl").open("w", encoding="utf-8") as file:
            for entry in history:
                file.write(json.dumps({name: entry[name] for name in _LOGGED}) + "\n")
        save_adapter(model, out / "adapter")
    first, last = ({name: entry[name] for name in ("loss", "ce", "divergence")} for entry in (history[0], history[-1]))
    speed = trainer.tokens_seen / seconds if steps > done else None
    return {
        "summary": f"loss {first['loss']:.3f} → {last['loss']:.3f} in {steps} steps"
        + (f", {speed:.0f} tokens/s" if speed else ""),
        "steps": steps,
        "steps_resumed": done,
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "first": first,
        "last": last,
        "seconds": seconds,
        "seconds_per_step": trainer.seconds_per_step(),
        "tokens": trainer.tokens_seen,
        "tokens_per_second": speed,
        "processes": parallel.world(),
        "device": str(device),
        "precision": "float32" if step.autocast is None else str(step.autocast).removeprefix("torch."),
    }


def _open_cache(
    settings: Distill, logits: Path | None, base: Path, tokenizer: Any, rows: Sequence[Row]
) -> Reader | None:
    """The cache, when the loss needs one, after checking that it speaks the student's tokens and has every row."""
    if not settings.uses_logits:
        return None
    if logits is None:
        raise RecipeError("distill.kl_weight is above 0 and there are no captured logits")
    cache = Reader(logits)
    cache.expect(
        tokenizer=vocabulary.tokenizer_digest(tokenizer, ids=cache.source.vocabulary),
        template=vocabulary.template_digest(tokenizer) or "",
    )
    width = int(checkpoint_files.read_config(base)["vocab_size"])
    if cache.source.vocabulary > width:
        raise ArtifactError(f"{logits}: probabilities over {cache.source.vocabulary} ids, {base} has {width}")
    cache.check(rows, settings.temperature)  # now, and not when a damaged shard's turn comes
    return cache


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


def mark_whole(checkpoint: Path) -> None:
    """Say that a checkpoint was written to its end."""
    (checkpoint / _WHOLE).touch()


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
            raise DataError(f"{path}: row {row.id} has no answer token to learn from", hint="run `select` again")
        if render(tokenizer, row.messages, where=row.id) != row.prompt_ids:
            raise ModelError(
                f"row {row.id}: the student's tokenizer and chat template do not give the tokens in {path}",
                hint="choose a student of the teacher's family, with the teacher's chat template",
            )


def _arguments(settings: Distill, folder: Path, *, steps: int, seed: int, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,  # one item of the plan is one batch
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_share * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=optimizer_name(settings, device),
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
        ddp_find_unused_parameters=False,
    )
    # One process trains on one GPU: DataParallel would split batches that are not made of rows alone.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Collator:
    """One planned batch → this process's share of it, as tensors. `vocabulary`: ids that the student's head has."""

    def __init__(self, cache: Reader | None, temperature: float, vocabulary: int) -> None:
        self.cache = cache
        self.temperature = temperature
        self.vocabulary = vocabulary
        # Where the loss itself does not look, since it would wait for the GPU.
        self.checks = torch.cuda.is_available()

    def __call__(self, batches: Sequence[Sequence[Row]]) -> dict[str, Any]:
        """Rows as input_ids [rows, length]; `at` and `labels` [N]: where, in the flattened rows, each answer token is
        predicted, and which it is. `answer_tokens` counts those of all processes."""
        (whole,) = batches
        share = whole[parallel.rank() :: parallel.world()]
        # With fewer rows than processes one has none: it runs a row without its answer, and waits for the others.
        batch = load.pad_rows(share or whole[:1], pad_id=0)
        if not share:
            batch.answers.fill_(False)
        tensors: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "at": batch.answers.flatten().nonzero().squeeze(-1),
            "labels": torch.tensor([token for row in share for token in row.answer_ids], dtype=torch.long),
            "answer_tokens": sum(len(row.answer_ids) for row in whole),
            "tokens": sum(len(row.token_ids) - 1 for row in whole),
        }
        if self.cache is not None and share:
            pairs = [self.cache.at_temperature(row, self.temperature) for row in share]
            width = max(ids.shape[1] for ids, _ in pairs)
            tensors["teacher_ids"] = torch.from_numpy(_stack([ids for ids, _ in pairs], width, 0))
            tensors["teacher_logprobs"] = torch.from_numpy(_stack([logp for _, logp in pairs], width, -np.inf))
            if self.checks:
                Teacher(tensors["teacher_ids"], tensors["teacher_logprobs"]).check(self.vocabulary)
        return tensors


def _stack(parts: Sequence[Any], width: int, fill: float) -> Any:
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=fill) for part in parts])


class _Step:
    """Forward pass and loss of one batch."""

    def __init__(
        self, model: Any, settings: Distill, autocast: torch.dtype | None, vocabulary_size: int | None
    ) -> None:
        self.model = model
        self.settings = settings
        self.autocast = autocast
        self.divergence: str = settings.divergence  # as the log calls it
        self.head = load.head_of(model, vocabulary=vocabulary_size)
        self.chunk = pick_chunk(self.head.vocabulary, model.device)
        self.objective = Objective(
            temperature=settings.temperature,
            ce_weight=settings.ce_weight,
            kl_weight=settings.kl_weight,
            divergence=settings.divergence,
            jsd_beta=settings.jsd_beta,
            skew=settings.skew,
        )

    def as_model(self) -> Any:
        """The model, whose forward now gives hidden states: what wraps it for several GPUs calls no other method."""
        inner = load.backbone(self.model)
        self.model.forward = lambda input_ids: inner(input_ids=input_ids, use_cache=False).last_hidden_state
        return self.model

    def __call__(self, model: Any, inputs: Mapping[str, Any], answer_tokens: int) -> Loss:
        """The loss of this process's share. No attention mask: see load.answer_states."""
        kind = inputs["input_ids"].device.type
        teacher = Teacher(inputs["teacher_ids"], inputs["teacher_logprobs"]) if "teacher_ids" in inputs else None
        with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
            hidden = model(inputs["input_ids"])
            return distillation_loss(
                hidden.flatten(0, 1).index_select(0, inputs["at"]),
                self.head,
                inputs["labels"],
                teacher,
                weight=self.head.matrix,
                objective=self.objective,
                tokens=float(answer_tokens),
                chunk=self.chunk,
            )


def _check_memory(step: _Step, collate: _Collator, batches: Sequence[list[Row]], settings: Distill) -> None:
    """Try the largest batch before the first step: what does not fit is said now, and not hours later.

    Raises HostError with the batch size that does fit.
    """
    widest = max(batches, key=lambda batch: len(batch) * max(len(row.token_ids) for row in batch))
    size = len(widest)
    while not _fits(step, collate, widest[:size]):
        if size <= parallel.world():
            free, total = torch.cuda.mem_get_info()
            raise HostError(
                f"a single row of {max(len(row.token_ids) for row in widest)} tokens does not fit in GPU memory "
                f"({total / 2**30:.0f} GiB, {(total - free) / 2**30:.0f} taken)",
                hint="set distill.gradient_checkpointing or distill.load_in_4bit to true, or lower data.max_length",
            )
        size = max(parallel.world(), size // 2)
    if size < len(widest):
        more = settings.gradient_accumulation * math.ceil(settings.batch_size / size)
        raise HostError(
            f"a batch of {len(widest)} rows of {max(len(row.token_ids) for row in widest)} tokens does not fit in GPU "
            f"memory; {size} rows do",
            hint=f"set distill.batch_size = {size} and distill.gradient_accumulation = {more}: as many rows a step",
        )


def _fits(step: _Step, collate: _Collator, rows: Sequence[Row]) -> bool:
    # In a function of its own, so that nothing of a failed try is still referred to when the next begins.
    inner = load.backbone(step.model)
    try:
        inputs = {
            name: value.to("cuda") if isinstance(value, torch.Tensor) else value
            for name, value in collate([rows]).items()
        }
        loss = step(lambda ids: inner(input_ids=ids, use_cache=False).last_hidden_state, inputs, len(rows))
        torch.autograd.backward(loss.total)
    except torch.OutOfMemoryError:
        return False
    finally:
        step.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


_LOGGED = ("step", "loss", "ce", "divergence", "learning_rate", "grad_norm", "tokens")


class _Trainer(Trainer):  # type: ignore[misc]
    """Transformers' loop with our loss, our log and checkpoints that say when they are whole."""

    def follow(self, step: _Step, report: Reporter, task: Task, steps: int) -> None:
        self.step, self.report, self.task, self.steps = step, report, task, steps
        self.model_accepts_loss_kwargs = True  # else the loss, already per token, is divided once more
        self.tokens_seen = 0
        self._parts: list[torch.Tensor] = []
        self._answer_tokens = 0
        self._since = (time.perf_counter(), 0)
        self._logged_s: list[float] = []

    def seconds_per_step(self) -> float | None:
        """Median time from one step's end to the next; saving checkpoints is in a few of them."""
        gaps = np.diff(self._logged_s)
        return float(np.median(gaps)) if len(gaps) else None

    def get_train_dataloader(self) -> Any:
        # Not prepared by accelerate: every process sees every planned batch, and takes its share of it.
        # Logits are unpacked in this process, while the GPU works off what was queued: 2.5 ms for 2,048 tokens. Another
        # process for it, and the thread that takes over its tensors, cost more than that (docs/gpu.md).
        return DataLoader(
            self.train_dataset,
            batch_size=1,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], int]:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        return batches, sum(batch["answer_tokens"] for batch in batches)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        assert num_items_in_batch is not None
        loss = self.step(model, inputs, num_items_in_batch)
        self._parts.append(torch.stack([loss.total.detach(), loss.ce, loss.divergence]))
        self._answer_tokens += inputs["answer_tokens"]
        self.tokens_seen += inputs["tokens"]
        # The gradient is averaged over the processes; each has its share of one sum.
        return loss.total * parallel.world()

    def _sums(self) -> dict[str, float]:
        """Loss and its parts since the last call, over all processes; once a step, since a GPU has to be waited for."""
        parts = self.accelerator.reduce(torch.stack(self._parts).sum(0), "sum").tolist()
        tokens = self._answer_tokens
        self._parts, self._answer_tokens = [], 0
        return dict(zip(("loss", "ce", "divergence", "tokens"), (*parts, tokens), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called once per step, and once at the end with figures of time, which the log leaves out."""
        if "loss" in logs:
            logs |= self._sums()
            self._logged_s.append(time.perf_counter())
            for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
                if not math.isfinite(logs[name]):
                    raise ModelError(
                        f"the {what} is {logs[name]} at step {self.state.global_step}: training stopped, and this step "
                        "was not kept",
                        hint="lower distill.learning_rate, or set distill.precision = 'float32'",
                    )
            self.task.advance()
            step = self.state.global_step
            if step % self.step.settings.log_every_steps == 0 or step in (1, self.steps):
                now, seen = time.perf_counter(), self.tokens_seen
                speed = (seen - self._since[1]) / (now - self._since[0])
                self._since = (now, seen)
                self.report.line(
                    f"step {step}/{self.steps}  loss {logs['loss']:.4f}  ce {logs['ce']:.4f}  "
                    f"{self.step.divergence} {logs['divergence']:.4f}  "
                    f"lr {logs['learning_rate']:.2e}  {speed:.0f} tok/s"
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        mark_whole(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
