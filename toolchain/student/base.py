"""Student before training: a folder as it is, or some of its decoder layers, taken out on the level of files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from toolchain.artifact import CHECKPOINT
from toolchain.disk import require_free
from toolchain.errors import ModelError, RecipeError
from toolchain.recipe import Student
from toolchain.reporter import Reporter, bar
from toolchain.student import checkpoint_files, load

_LAYER = re.compile(r"^(.*\blayers\.)(\d+)(\..+)$")
_COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja",
    "chat_template.json", "generation_config.json", "LICENSE*",
)  # fmt: skip


def prepare(settings: Student, *, model: Path, out: Path, report: Reporter) -> dict[str, Any]:
    """Write `out`/reference.json, or `out`/checkpoint/ with `keep_layers` renumbered from 0.

    Raises ModelError for a folder that is damaged or of another shape, RecipeError for a layer it does not have.
    """
    figures = load.validate(model)
    if settings.keep_layers is None:
        load.write_reference(out, model)
        return figures
    config = checkpoint_files.read_config(model)
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ModelError(f"{model}/config.json: no num_hidden_layers", hint="leave student.keep_layers out")
    if settings.keep_layers[-1] >= layers:
        raise RecipeError(
            f"student.keep_layers: no layer {settings.keep_layers[-1]}: {model} has {layers}, from 0 to {layers - 1}"
        )
    checkpoint = out / CHECKPOINT
    checkpoint.mkdir()
    require_free(checkpoint, sum(path.stat().st_size for path in model.glob("*.safetensors")), "the student")
    _copy_weights(model, settings.keep_layers, checkpoint, report)
    text = json.dumps(_cut_config(config, settings.keep_layers), indent=2, sort_keys=True)
    (checkpoint / "config.json").write_text(text + "\n", encoding="utf-8")
    copy_tokenizer(model, checkpoint)
    figures, kept = load.validate(checkpoint), len(settings.keep_layers)
    summary = f"{kept} of {layers} layers, {figures['parameters'] / 1e6:.1f} M parameters"
    return {"summary": summary, **figures, "layers_before": layers, "layers": kept}


def copy_tokenizer(source: Path, checkpoint: Path) -> None:
    """Copy tokenizer, chat template, generation configuration and licence as they are."""
    for pattern in _COPIED:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, checkpoint / path.name)


def _copy_weights(model: Path, keep: tuple[int, ...], checkpoint: Path, report: Reporter) -> None:
    """One output shard per input shard that keeps a tensor, so that memory holds one shard at most."""
    new_number = {old: new for new, old in enumerate(keep)}
    tensors = checkpoint_files.tensors_of(model)
    shards: dict[Path, dict[str, str]] = {}
    numbers = set()
    for name, info in tensors.items():
        found = _LAYER.match(name)
        if found is None:
            shards.setdefault(info.file, {})[name] = name
            continue
        number = int(found[2])
        numbers.add(number)
        if number in new_number:
            shards.setdefault(info.file, {})[name] = f"{found[1]}{new_number[number]}{found[3]}"
    if not set(keep) <= numbers:
        raise ModelError(f"{model}: no tensors called …layers.{min(set(keep) - numbers)}.…: names of another kind")
    weight_map: dict[str, str] = {}
    size = 0
    with bar(report, "take layers", total=len(shards), unit="file") as task:
        for at, (path, names) in enumerate(sorted(shards.items()), start=1):
            target = "model.safetensors" if len(shards) == 1 else f"model-{at:05}-of-{len(shards):05}.safetensors"
            with safe_open(path, framework="pt") as file:
                kept = {new: file.get_tensor(old) for old, new in sorted(names.items())}
            save_file(kept, checkpoint / target, metadata={"format": "pt"})
            size += sum(tensor.nbytes for tensor in kept.values())
            weight_map |= dict.fromkeys(kept, target)
            task.advance()
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2)
        (checkpoint / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _cut_config(config: dict[str, Any], keep: tuple[int, ...]) -> dict[str, Any]:
    """The configuration for these layers: their number, and every list with an entry per layer."""
    layers = config["num_hidden_layers"]
    if config.get("mlp_only_layers"):
        raise ModelError("config.json: mlp_only_layers names layers by number: not supported with keep_layers")
    cut = {
        name: [value[at] for at in keep]
        if isinstance(value, list) and "layer" in name and len(value) == layers
        else value
        for name, value in config.items()
    }
    return {**cut, "num_hidden_layers": len(keep)}
