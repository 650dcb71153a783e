"""What a checkpoint folder holds, from its files alone: no weight is read, and no heavy library is loaded."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_HEADER_LIMIT = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their names. Raises ModelError when the file is not whole.

    Layout (https://huggingface.co/docs/safetensors): u64 length of a JSON header, the header, the tensors' bytes.
    """
    again = "copy or download the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise ModelError(f"{path}: not a safetensors file: {size} bytes long", hint=again)
            (length,) = struct.unpack("<Q", start)
            if length > min(_HEADER_LIMIT, size - 8):
                raise ModelError(
                    f"{path}: header of {length} bytes in a file of {size}: damaged or cut off", hint=again
                )
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        found = {name: TensorInfo(path, header[name]["dtype"], tuple(header[name]["shape"])) for name in sorted(header)}
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file", hint="copy the missing shard into the folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: header cannot be read: {error}", hint=again) from error
    if 8 + length + end != size:
        raise ModelError(f"{path}: {size} bytes long, {8 + length + end} by its header: damaged or cut off", hint=again)
    return found


def tensors_of(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint. Raises ModelError: no safetensors, a missing, cut off or incomplete shard."""
    index, single = folder / _INDEX, folder / "model.safetensors"
    if not index.exists() and not single.exists():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder}: weights only as {pickles[0]}, a pickle: loading one runs whatever code is in it",
                hint="take the model's safetensors files, or convert it where you trust it",
            )
        raise ModelError(f"{folder}: no model.safetensors and no {_INDEX}", hint="give a Hugging Face model folder")
    if not index.exists():
        return read_header(single)
    try:
        named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(named.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: cannot be read: {error}") from error
    found: dict[str, TensorInfo] = {}
    for shard in shards:
        found |= read_header(folder / shard)
    missing = sorted(name for name in named if name not in found)
    if missing:
        raise ModelError(f"{folder}: {named[missing[0]]} lacks {missing[0]}, which {_INDEX} names")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ModelError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json", hint="give a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/config.json: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json: not a JSON object")
    return config
