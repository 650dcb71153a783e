"""A checkpoint folder → model and tokenizer, offline and from safetensors only; and what a model says about rows."""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from toolchain.artifact import CHECKPOINT, REFERENCE
from toolchain.data.rows import Row
from toolchain.errors import ArtifactError, HostError, ModelError
from toolchain.student.checkpoint_files import read_config, tensors_of

Tokenizer = Any
Model = Any

_CHUNK = 512
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- Artifacts that are a folder, or point to one.


def write_reference(out: Path, checkpoint: Path) -> None:
    """Say that the artifact in `out` is the folder `checkpoint`, which stays where it is."""
    (out / REFERENCE).write_text(json.dumps({"path": str(checkpoint.resolve())}) + "\n", encoding="utf-8")


def resolve(artifact: Path) -> Path:
    """The checkpoint folder of a `teacher`, `student` or `merge` artifact. Raises ArtifactError."""
    inside = artifact / CHECKPOINT
    if inside.is_dir():
        return inside
    try:
        path = Path(json.loads((artifact / REFERENCE).read_text(encoding="utf-8"))["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{artifact}: holds neither {CHECKPOINT}/ nor a readable {REFERENCE}") from error
    if not path.is_dir():
        raise ArtifactError(
            f"{artifact}: points to {path}, which is gone", hint="put the folder back, or change the recipe's model"
        )
    return path


# --- A folder as a model.


def validate(folder: Path) -> dict[str, Any]:
    """Check that `folder` can be a teacher or student; returns figures for the manifest. Raises ModelError."""
    config = read_config(folder)
    tensors = tensors_of(folder)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{folder}: the tokenizer has no chat template",
            hint="take the instruct model, or put its chat_template.jinja into the folder",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no eos token", hint="set eos_token in tokenizer_config.json")
    ids = max(tokenizer.get_vocab().values()) + 1
    rows = next(
        (info.shape[0] for name, info in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))),
        config.get("vocab_size", 0),
    )
    if rows < ids:
        raise ModelError(
            f"{folder}: {rows} embedding rows, but the tokenizer has ids up to {ids - 1}",
            hint="model and tokenizer are not of one release",
        )
    return {
        "architecture": config.get("model_type"),
        "parameters": sum(_count(info.shape) for info in tensors.values()),
        "vocabulary_rows": rows,
        "tokenizer_ids": ids,
    }


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


# --- Model and tokenizer.


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # The tokenizers library raises plain Exception for what it cannot read; any other class is a bug.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | KeyError | TypeError):
            raise
        raise ModelError(
            f"{folder}: the tokenizer cannot be loaded: {str(error).partition(chr(10))[0]}",
            hint="tokenizer.json or tokenizer_config.json is missing or damaged: copy them again",
        ) from error


def render(tokenizer: Tokenizer, conversation: Sequence[Mapping[str, str]]) -> str:
    """A conversation by the tokenizer's chat template, up to where the model's answer begins. Raises ModelError."""
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as error:
        raise ModelError(
            f"{tokenizer.name_or_path}: the chat template cannot be rendered: {error}",
            hint="take the one that the model came with",
        ) from error


def load_model(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str, load_in_4bit: bool = False
) -> tuple[Model, Tokenizer]:
    """A checkpoint in eval mode with SDPA attention, and its tokenizer; never reaches a network.

    `load_in_4bit`: linear layers as bitsandbytes NF4 with double quantization, computing in `dtype`. Raises ModelError,
    and HostError for 4 bits without an NVIDIA GPU.
    """
    expected = tensors_of(folder)
    tokenizer = load_tokenizer(folder)
    four_bits = _four_bits(dtype, device) if load_in_4bit else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **four_bits,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from error
    _refuse_random(info, folder, tensors=len(expected))
    return (model if load_in_4bit else model.to(device)).eval(), tokenizer


def _refuse_random(info: Mapping[str, Any], folder: Path, *, tensors: int) -> None:
    """Transformers fills what it does not find with random numbers and goes on."""
    lost = sorted({*info["missing_keys"], *(str(entry) for entry in info["mismatched_keys"])})
    if lost:
        raise ModelError(f"{folder}: {len(lost)} of {tensors} tensors missing or of another shape, such as {lost[0]}")


def load_layer_by_layer(folder: Path) -> Model:
    """A checkpoint on the processor in float32, whose weights are read from their files whenever they are used.

    Holds one matrix at a time: a model of any size can be run in little memory, best on few and large batches. Raises
    ModelError.
    """
    expected = tensors_of(folder)
    stored = {tensor.dtype for tensor in expected.values()}
    # Transformers looks at every weight once. As it is stored, one costs no page of its file for that.
    dtype = _STORED[stored.pop()] if len(stored) == 1 and stored <= _STORED.keys() else torch.float32
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
            local_files_only=True, device_map={"": "disk"}, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: the model cannot be loaded: {error}") from error
    _refuse_random(info, folder, tensors=len(expected))
    # None is there yet; this is what they are read into.
    return model.float().eval()


def _four_bits(dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """Arguments of from_pretrained for NF4, as QLoRA uses it (Dettmers et al. 2023). Raises HostError."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise HostError(
            "load_in_4bit needs the package 'bitsandbytes'", hint="pip install -c constraints.txt -e '.[train]'"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


@torch.no_grad()
def round_to_four_bits(model: Model, folder: Path) -> None:
    """Give the linear layers of `model` the values that `folder` has when loaded in 4 bits, as QLoRA trains on it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    from toolchain.student.precision import pick_device, weights_type

    device = pick_device()
    quantized, _ = load_model(folder, dtype=weights_type(device), device=device, load_in_4bit=True)
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.copy_(weight)


def backbone(model: Model) -> nn.Module:
    """The part of a causal LM below its head: token ids → hidden states. With an adapter: the adapted one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast(nn.Module, getattr(inner, inner.base_model_prefix))


@dataclass(frozen=True)
class Head:
    """Hidden states [..., H] → float32 logits [..., vocabulary], as the model's own forward gives them."""

    linear: nn.Module
    scale: float
    softcap: float | None
    vocabulary: int

    @property
    def matrix(self) -> torch.Tensor | None:
        """[vocabulary, H] where the head is that matrix and nothing more; None where it is not."""
        if type(self.linear) is not nn.Linear or self.linear.bias is not None:
            return None
        if self.scale != 1.0 or self.softcap is not None:
            return None
        return self.linear.weight[: self.vocabulary]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.linear(hidden)[..., : self.vocabulary].float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return cast(torch.Tensor, logits)


def head_of(model: Model, *, vocabulary: int | None = None) -> Head:
    """The output head, with what Granite (logits_scaling), Cohere (logit_scale) and Gemma (softcap) do after it."""
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    linear = model.get_output_embeddings()
    width = int(config.vocab_size)
    return Head(linear, scale, None if softcap is None else float(softcap), min(vocabulary or width, width))


def stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends an answer: eos_token_id of generation_config.json, and the tokenizer's eos."""
    path = folder / "generation_config.json"
    given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
    listed = given if isinstance(given, list) else [] if given is None else [given]
    return tuple(sorted({*listed, tokenizer.eos_token_id}))


# --- What a model says about rows.


@dataclass(frozen=True)
class Batch:
    """Right-padded rows without their last token, which predicts nothing that is asked."""

    input_ids: torch.Tensor
    """int64 [rows, length]"""
    answers: torch.Tensor
    """bool [rows, length]: positions whose logits predict an answer token"""


def pad_rows(rows: Sequence[Row], *, pad_id: int) -> Batch:
    """Rows as one batch. What `pad_id` is does not matter: nothing before it attends to it."""
    width = max(len(row.token_ids) for row in rows) - 1
    ids = torch.full((len(rows), width), pad_id)
    answers = torch.zeros((len(rows), width), dtype=torch.bool)
    for at, row in enumerate(rows):
        length = len(row.token_ids) - 1
        ids[at, :length] = torch.tensor(row.token_ids[:-1])
        answers[at, len(row.prompt_ids) - 1 : length] = True
    return Batch(ids, answers)


def answer_states(model: Model, rows: Sequence[Row]) -> Iterator[torch.Tensor]:
    """One forward pass: for each row the hidden states [answer tokens, H] that predict its answer.

    No attention mask: padding stands on the right, where causal attention does not look back from, and without a mask
    the fast kernels apply.
    """
    batch = pad_rows(rows, pad_id=0)
    # Weights that are read when they are used are nowhere until then.
    device = "cpu" if model.device.type == "meta" else model.device
    hidden = backbone(model)(input_ids=batch.input_ids.to(device), use_cache=False).last_hidden_state
    for at in range(len(rows)):
        yield hidden[at][batch.answers[at].to(hidden.device)]


def batches_in_order(rows: Sequence[Row], *, batch_tokens: int) -> Iterator[list[Row]]:
    """Neighbouring rows whose padded size stays within `batch_tokens`; a longer row goes alone."""
    batch: list[Row] = []
    width = 0
    for row in rows:
        wider = max(width, len(row.token_ids))
        if batch and wider * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], len(row.token_ids)
        batch.append(row)
        width = wider
    if batch:
        yield batch


def answer_logprobs(model: Model, rows: Sequence[Row], *, batch_tokens: int) -> Iterator[np.ndarray[Any, Any]]:
    """For each row, in order, float32 [answer tokens, vocabulary]: log-softmax of what predicts its answer."""
    head = head_of(model)
    for batch in batches_in_order(rows, batch_tokens=batch_tokens):
        with torch.inference_mode():
            states = list(answer_states(model, batch))
        for state in states:
            with torch.inference_mode():
                parts = [head(part).log_softmax(-1).cpu().numpy() for part in torch.split(state, _CHUNK)]
            yield np.concatenate(parts)
