"""Student answers, teacher scores: goes on with the adapter of `distill`. Writes adapter/ and log.jsonl.

The loop is TRL's GKDTrainer (Agarwal et al. 2024, arXiv 2306.13649); docs/decisions/0006-on-policy-through-trl.md says
why, and what is overridden. Prompts are the rows' token ids, never rendered anew. Checkpoints go to resume/.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer

from toolchain.data.rows import Row, read_rows
from toolchain.errors import ArtifactError, DataError, HostError, ModelError
from toolchain.recipe import Distill, OnPolicy
from toolchain.reporter import Reporter, Task, bar
from toolchain.student import checkpoint_files, distill, load, precision, vocabulary
from toolchain.student.engine import checkpoints_activations, optimizer_name

IGNORE = -100
_CHUNK = 512
"""Answer positions per use of both heads: logits of [batch, length, vocabulary] never exist."""


def run(
    settings: OnPolicy,
    training: Distill,
    *,
    load_teacher_in_4bit: bool,
    max_length: int,
    seed: int,
    teacher: Path,
    base: Path,
    adapter: Path,
    rows: Path,
    out: Path,
    report: Reporter,
) -> dict[str, Any]:
    """Train `adapter` further for `settings.steps`. `teacher` and `base` are checkpoint folders; `training` has the
    rest of what the phase shares with `distill`: precision, schedule, clipping, how often to log.

    Raises DataError, ModelError (a loss that is not finite: the step is named), ArtifactError, and HostError when the
    GPU's memory does not suffice.
    """
    examples = read_rows(rows)
    ids = vocabulary.require_common(teacher, base, remedy="set on_policy.steps = 0").ids
    _check(examples, rows, ids=ids, max_length=max_length)
    device = precision.pick_device()
    dtype = precision.weights_type(device)
    set_seed(seed)
    student, tokenizer = load.load_model(base, dtype=dtype, device=device, load_in_4bit=training.load_in_4bit)
    student.generation_config.eos_token_id = list(load.stop_ids(base, tokenizer))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by position: which token it is does not matter
    model = _with_adapter(student, adapter, checkpointing=checkpoints_activations(training, "transformers"))
    teacher_model, _ = load.load_model(teacher, dtype=dtype, device=device, load_in_4bit=load_teacher_in_4bit)
    batches = plan(examples, settings, training, seed=seed)
    checkpoints = out / "resume"
    checkpoints.mkdir(exist_ok=True)
    newest = distill.newest_whole(checkpoints)
    done = int(newest.name.rpartition("-")[2]) if newest else 0

    with bar(report, "student answers", total=settings.steps, unit="step") as task:
        task.advance(done)
        trainer = _Trainer(
            model=model,
            teacher=teacher_model,
            ids=ids,
            batches=batches,
            tokenizer=tokenizer,
            args=_arguments(settings, training, checkpoints, seed=seed, device=device),
        )
        trainer.follow(settings, training, report, task, max_length=max_length, device=device)
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        except torch.OutOfMemoryError as error:
            raise HostError(
                f"on_policy: the GPU's memory is used up at step {trainer.state.global_step + 1}",
                hint="lower on_policy.batch_size or on_policy.max_new_tokens, by half to begin with; then run again",
            ) from error
        seconds = time.perf_counter() - started
    history = [entry for entry in trainer.state.log_history if "student_rows" in entry]
    with (out / "log.jsonl").open("w", encoding="utf-8") as file:
        for entry in history:
            file.write(json.dumps({name: entry[name] for name in _LOGGED}) + "\n")
    distill.save_adapter(model, out / "adapter")
    sums = {name: sum(entry[name] for entry in history) for name in ("student_rows", "ended_rows", "answer_tokens")}
    first, last = history[0]["loss"], history[-1]["loss"]
    speed = trainer.tokens_seen / seconds if settings.steps > done else None
    return {
        "summary": f"divergence {first:.4f} → {last:.4f} in {settings.steps} steps"
        + (f", {speed:.0f} tokens/s" if speed else ""),
        "steps": settings.steps,
        "steps_resumed": done,
        "rows": len(examples),
        "first": {"loss": first},
        "last": {"loss": last},
        **sums,
        "seconds": seconds,
        "tokens": trainer.tokens_seen,
        "tokens_per_second": speed,
        "common_ids": ids,
        "engine": "trl",
        "trl": trl.__version__,
        "device": str(device),
        "precision": "float32" if trainer.autocast_type is None else str(trainer.autocast_type).removeprefix("torch."),
    }


def plan(rows: Sequence[Row], settings: OnPolicy, training: Distill, *, seed: int) -> list[list[Row]]:
    """As many batches as there are steps, in order, from rows, settings and seed alone."""
    per_epoch = math.ceil(len(rows) / settings.batch_size)
    sizes = {"batch_size": settings.batch_size, "epochs": settings.steps / per_epoch}
    # A stream of its own: the phase does not repeat the order of `distill`.
    return distill.plan(rows, training.model_copy(update=sizes), seed=seed + 1)


def _check(rows: Sequence[Row], path: Path, *, ids: int, max_length: int) -> None:
    if not rows:
        raise DataError(f"{path}: no rows")
    for row in rows:
        if not row.answer_ids or not row.prompt_ids:
            raise DataError(f"{path}: row {row.id} has no answer token to learn from", hint="run `select` again")
        if max(row.token_ids) >= ids:
            raise ModelError(
                f"row {row.id}: token {max(row.token_ids)}, but teacher and student have only ids below {ids} in common"
            )
        if len(row.prompt_ids) >= max_length:
            raise DataError(
                f"row {row.id}: its prompt of {len(row.prompt_ids)} tokens leaves no room for an answer; "
                f"data.max_length is {max_length}"
            )


def _with_adapter(student: Any, adapter: Path, *, checkpointing: bool) -> Any:
    checkpoint_files.read_header(adapter / "adapter_model.safetensors")  # a damaged one is named
    try:
        model = PeftModel.from_pretrained(student, adapter, is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{adapter}: cannot be loaded: {error}", hint="run `distill` again") from error
    if checkpointing:
        model.enable_input_require_grads()
    # Also while it answers: bitsandbytes packs 4-bit weights for inference on a CPU, and has no gradient through that.
    return model.train()


def _arguments(settings: OnPolicy, training: Distill, folder: Path, *, seed: int, device: torch.device) -> GKDConfig:
    arguments = GKDConfig(
        output_dir=str(folder),
        lmbda=settings.student_share,
        beta=settings.jsd_beta,
        temperature=settings.sampling_temperature,
        max_new_tokens=settings.max_new_tokens,
        max_length=None,
        per_device_train_batch_size=1,  # one item of the data set is one batch
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup_share * settings.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        gradient_checkpointing=checkpoints_activations(training, "transformers"),
        optim=optimizer_name(training, device),
        bf16=False,  # autocast is entered where the loss is computed; TRL's default would fail on most processors
        seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.checkpoint_every_steps,
        save_total_limit=2,
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # as in distill: one process, one GPU
    return arguments


class Collator:
    """A planned batch, as indices of rows → what GKDTrainer reads: exactly the rows' tokens, and padding."""

    def __init__(self, batches: Sequence[Sequence[Row]], pad_id: int) -> None:
        self.batches = batches
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Mapping[str, int]]) -> dict[str, torch.Tensor]:
        (item,) = items
        rows = self.batches[item["batch"]]
        prompts = [list(row.prompt_ids) for row in rows]
        answers = [list(row.answer_ids) for row in rows]
        whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        labels = [[IGNORE] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ones = [[1] * len(ids) for ids in whole]
        return {
            "input_ids": _pad(whole, self.pad_id),
            "attention_mask": _pad(ones, 0),
            "labels": _pad(labels, IGNORE),
            # Generation goes on at the right edge, so prompts are padded at the left.
            "prompts": _pad(prompts, self.pad_id, left=True),
            "prompt_attention_mask": _pad([[1] * len(ids) for ids in prompts], 0, left=True),
        }


def _pad(parts: Sequence[list[int]], fill: int, *, left: bool = False) -> torch.Tensor:
    width = max(len(part) for part in parts)
    padding = [[fill] * (width - len(part)) for part in parts]
    pairs = zip(padding, parts, strict=True) if left else zip(parts, padding, strict=True)
    return torch.tensor([first + second for first, second in pairs])


_LOGGED = ("step", "loss", "learning_rate", "grad_norm", "student_rows", "ended_rows", "answer_tokens")


class _Trainer(GKDTrainer):  # type: ignore[misc]
    """GKDTrainer with planned batches, a loss over the ids in common, and checkpoints that say when they are whole."""

    def __init__(
        self, *, model: Any, teacher: Any, ids: int, batches: Sequence[Sequence[Row]], tokenizer: Any, args: GKDConfig
    ) -> None:
        self.heads = (load.head_of(model, vocabulary=ids), load.head_of(teacher, vocabulary=ids))
        # TRL refuses models of unequal width before it has seen a logit. Only ids in common enter the loss below.
        teacher.config.get_text_config().vocab_size = model.config.get_text_config().vocab_size
        adapter = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
        super().__init__(
            model=model,
            teacher_model=teacher,
            args=args,
            data_collator=Collator(batches, tokenizer.pad_token_id),
            train_dataset=Dataset.from_dict({"batch": list(range(len(batches)))}),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        # TRL turns the adapter of a 4-bit base to bfloat16, where it loses digits and small steps round away.
        for weight, values in adapter:
            weight.data = values
        rows = model.get_output_embeddings().weight.shape[0]
        if rows > ids:
            self.generation_config.suppress_tokens = list(range(ids, rows))

    def follow(
        self,
        settings: OnPolicy,
        training: Distill,
        report: Reporter,
        task: Task,
        *,
        max_length: int,
        device: torch.device,
    ) -> None:
        self.settings, self.every, self.report, self.task = settings, training.log_every_steps, report, task
        self.autocast_type = precision.autocast_type(training.precision, device)
        self.longest = max_length
        self.tokens_seen = 0
        self._sums: Counter[str] = Counter()

    def generate_on_policy_outputs(
        self, model: Any, inputs: Mapping[str, torch.Tensor], generation_config: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        room = self.longest - inputs["prompts"].shape[1]
        generation_config.max_new_tokens = min(self.settings.max_new_tokens, room)
        ids, mask, labels = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
        stops = torch.tensor(generation_config.eos_token_id, device=labels.device)
        self._sums["student_rows"] += len(ids)
        self._sums["ended_rows"] += int(torch.isin(labels, stops).any(dim=1).sum())
        return ids, mask, labels

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """TRL's divergence per answer token. `num_items_in_batch` counts the rows' own answers, which are not those
        that the student gave: the count is taken here."""
        live = inputs["labels"][:, 1:] != IGNORE
        mask = inputs["attention_mask"]
        # The student's answers stand behind prompts that are padded at the left.
        where = {
            "input_ids": inputs["input_ids"],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        }
        tokens = int(live.sum())
        with torch.autocast(mask.device.type, dtype=self.autocast_type, enabled=self.autocast_type is not None):
            student = _states(self.accelerator.unwrap_model(model), where)[live]
            with torch.no_grad():
                teacher = _states(self.accelerator.unwrap_model(self.teacher_model), where)[live]
            loss = student.new_zeros((), dtype=torch.float32)
            for start in range(0, tokens, _CHUNK):
                part = slice(start, start + _CHUNK)
                loss = loss + checkpoint(self._divergence, student[part], teacher[part], use_reentrant=False)
        loss = loss / max(tokens, 1)
        if not math.isfinite(float(loss.detach())):
            raise _not_finite("loss", float(loss.detach()), self.state.global_step + 1)
        self._sums["answer_tokens"] += tokens
        self.tokens_seen += int(mask.sum())
        return loss

    def _divergence(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        logits = [head(hidden) for head, hidden in zip(self.heads, (student, teacher), strict=True)]
        total: torch.Tensor = self.generalized_jsd_loss(*logits, beta=self.beta, reduction="sum")
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called once per step, and once at the end with figures of time, which the log leaves out."""
        if "loss" in logs:
            step = self.state.global_step
            if not math.isfinite(logs["grad_norm"]):
                raise _not_finite("gradient", logs["grad_norm"], step)
            logs |= {name: self._sums[name] for name in ("student_rows", "ended_rows", "answer_tokens")}
            self._sums.clear()
            self.task.advance()
            if step % self.every == 0 or step in (1, self.settings.steps):
                ended = f"{logs['ended_rows']}/{logs['student_rows']} answers ended  " if logs["student_rows"] else ""
                self.report.line(
                    f"step {step}/{self.settings.steps}  divergence {logs['loss']:.4f}  {ended}"
                    f"lr {logs['learning_rate']:.2e}"
                )
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        distill.mark_whole(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card for a checkpoint that only a resumed run reads."""

    def _send_telemetry(self) -> None:
        """Nothing is reported, whatever the environment says."""


def _states(model: Any, where: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states [batch, length − 1, H] that predict the next token."""
    states: torch.Tensor = load.backbone(model)(**where, use_cache=False).last_hidden_state[:, :-1]
    return states


def _not_finite(what: str, value: float, step: int) -> ModelError:
    return ModelError(
        f"the {what} is {value} at step {step}: training stopped, nothing of it was kept",
        hint="lower on_policy.learning_rate, or set distill.precision = 'float32'",
    )
