"""Teacher → a checkpoint folder. A Hugging Face folder is checked and pointed to; a GGUF is unpacked to float16.

For a GGUF that llama.cpp is to run as it is, the folder has tokenizer, chat template and config, and no weights.
"""

import collections
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolchain.artifact import CHECKPOINT
from toolchain.disk import require_free
from toolchain.errors import ModelError, RecipeError
from toolchain.gguf.header import read_facts
from toolchain.recipe import SpecialTokens, Teacher
from toolchain.reporter import Reporter, bar
from toolchain.student import load
from toolchain.teacher import gguf_tokenizer

_ROLES = ("bos", "eos", "pad", "unk")
_UNREADABLE = (ValueError, KeyError, NotImplementedError, OSError, RuntimeError, TypeError)
_FLOAT16_MAX = torch.finfo(torch.float16).max


def prepare(settings: Teacher, *, model: Path, out: Path, report: Reporter) -> dict[str, Any]:
    """Write `out`/reference.json for a folder, `out`/checkpoint/ for a .gguf file. Raises ModelError, HostError."""
    if model.is_dir():
        metrics = load.validate(model)
        _check_special_tokens(settings.special_tokens, model)
        load.write_reference(out, model)
        return {"summary": f"{metrics['parameters'] / 1e6:.1f} M parameters", "source": "folder", **metrics}
    if model.suffix != ".gguf":
        raise ModelError(f"{model}: neither a folder nor a .gguf file", hint="teacher.model is one of the two")
    _check_sha256(model, settings.sha256, report)
    types = _read_types(model)
    checkpoint = out / CHECKPOINT
    checkpoint.mkdir()
    if settings.engine == "llama.cpp":
        facts = _describe(model, settings.special_tokens, checkpoint)
        summary = f"{facts['parameters'] / 1e6:.1f} M parameters, run by llama.cpp as they are"
        return {"summary": summary, "source": "gguf", "gguf_tensor_types": types, **facts}
    with bar(report, f"unpack {model.name}", total=None, unit="file"):
        _unpack(model, settings.special_tokens, checkpoint)
    metrics = load.validate(checkpoint)
    summary = f"{metrics['parameters'] / 1e6:.1f} M parameters, unpacked from {', '.join(types)} to float16"
    return {"summary": summary, "source": "gguf", "gguf_tensor_types": types, **metrics}


def check_float16(name: str, tensor: torch.Tensor) -> None:
    """Raise ModelError when a value is not finite or too large for float16."""
    largest = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    if not largest <= _FLOAT16_MAX:
        raise ModelError(
            f"{name}: value {largest:g} does not fit in float16 (largest {_FLOAT16_MAX:g})",
            hint="store it as float32 where the recipe lets you (merge.dtype), or use another model",
        )


def _check_special_tokens(wanted: SpecialTokens, folder: Path) -> None:
    """A folder is used as it is: special tokens of the recipe may repeat what it says, not change it."""
    tokenizer = load.load_tokenizer(folder)
    for role in _ROLES:
        token, found = getattr(wanted, role), getattr(tokenizer, f"{role}_token")
        if token is not None and token != found:
            raise RecipeError(
                f"teacher.special_tokens.{role} is {token!r}, {folder} has {found!r}",
                hint="a folder is not changed: set it in the folder's tokenizer_config.json",
            )


def _check_sha256(path: Path, wanted: str | None, report: Reporter) -> None:
    if wanted is None:
        return
    digest = hashlib.sha256()
    with bar(report, f"check {path.name}", total=path.stat().st_size, unit="byte") as task, path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            task.advance(len(block))
    if digest.hexdigest() != wanted:
        raise ModelError(
            f"{path}: SHA-256 is {digest.hexdigest()}, the recipe says {wanted}",
            hint="copy the file again, or correct teacher.sha256",
        )


def _read_types(path: Path) -> dict[str, int]:
    """How many tensors of each type a GGUF has. Raises ModelError when it is not one, or is cut off."""
    try:
        reader = GGUFReader(path)
        counts = collections.Counter(GGMLQuantizationType(tensor.tensor_type).name for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a whole GGUF file: {error}", hint="copy or download it again") from error
    if not counts:
        raise ModelError(f"{path}: a GGUF file without tensors (a vocabulary only?)")
    return dict(sorted(counts.items()))


def _unpack(path: Path, special: SpecialTokens, checkpoint: Path) -> None:
    tokenizer = _read_tokenizer(path, special)
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **_inside(path))
    except _UNREADABLE as error:
        raise ModelError(
            f"{path}: Transformers cannot unpack it: {error}",
            hint="give the model as a Hugging Face folder, or set teacher.engine = 'llama.cpp'",
        ) from error
    config = model.config
    for role in ("bos", "eos", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        setattr(config, f"{role}_token_id", number)
        setattr(model.generation_config, f"{role}_token_id", number)

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if bool(config.tie_word_embeddings) != tied:
        raise ModelError(
            f"{path}: config says tie_word_embeddings={config.tie_word_embeddings}, the weights say {tied}"
        )

    # What the loader leaves behind makes save_pretrained refuse, though the weights are plain now.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    for name, weight in model.named_parameters():
        check_float16(f"{path}: {name}", weight)
    model = model.to(torch.float16)
    require_free(checkpoint, int(sum(weight.nbytes for weight in model.parameters()) * 1.05), "the checkpoint")
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    clean_tokenizer_config(checkpoint)


def _describe(path: Path, special: SpecialTokens, checkpoint: Path) -> dict[str, Any]:
    """A folder that says of a GGUF what the other stages ask of a checkpoint, weights aside. Raises ModelError."""
    facts = read_facts(path)
    tokenizer = _read_tokenizer(path, special)
    if not tokenizer.chat_template:
        raise ModelError(f"{path}: has no chat template", hint="take the GGUF of an instruct model")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{path}: names no eos token", hint="set teacher.special_tokens.eos")
    ids = max(tokenizer.get_vocab().values()) + 1
    if facts.vocabulary_size < ids:
        raise ModelError(f"{path}: {facts.vocabulary_size} rows, but its tokenizer has ids up to {ids - 1}")
    config = {
        "model_type": facts.architecture,
        "vocab_size": facts.vocabulary_size,
        "max_position_embeddings": facts.context_length,
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")},
    }
    config = {key: value for key, value in config.items() if value is not None}
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = json.dumps({"eos_token_id": tokenizer.eos_token_id}) + "\n"
    (checkpoint / "generation_config.json").write_text(generation, encoding="utf-8")
    tokenizer.save_pretrained(checkpoint)
    clean_tokenizer_config(checkpoint)
    again = load.load_tokenizer(checkpoint)
    if again.get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"{path}: its tokenizer reads back with other tokens")
    return {
        "architecture": facts.architecture,
        "parameters": facts.parameters,
        "vocabulary_rows": facts.vocabulary_size,
        "tokenizer_ids": ids,
    }


def _inside(path: Path) -> dict[str, Any]:
    return {"gguf_file": path.name, "local_files_only": True}


def _read_tokenizer(path: Path, special: SpecialTokens) -> Any:
    """The tokenizer of a GGUF with the recipe's special tokens. Raises ModelError, RecipeError."""
    try:
        tokenizer = gguf_tokenizer.read_bpe(path)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **_inside(path))
            # Transformers takes these from its own table for the kind of tokenizer, not from the file.
            facts = read_facts(path)
            for role, token in (("bos", facts.bos_token), ("eos", facts.eos_token), ("pad", facts.pad_token)):
                _set_token(tokenizer, role, token, path)
    except _UNREADABLE as error:
        raise ModelError(
            f"{path}: its tokenizer cannot be read: {error}", hint="give the model as a Hugging Face folder"
        ) from error
    for role in _ROLES:
        _set_token(tokenizer, role, getattr(special, role), path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _set_token(tokenizer: Any, role: str, token: str | None, path: Path) -> None:
    if token is None:
        return
    if token not in tokenizer.get_vocab():
        raise RecipeError(f"teacher.special_tokens.{role}: {path.name} has no token {token!r}")
    setattr(tokenizer, f"{role}_token", token)


def clean_tokenizer_config(checkpoint: Path) -> None:
    """Take out of tokenizer_config.json what tells how this process loaded it, and ids that repeat the tokens."""
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path", *(f"{role}_token_id" for role in _ROLES)):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
