"""What a GGUF says of its model, as the converter takes it: a file for --metadata, and a model card for the licence.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#general-metadata
"""

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

from toolchain.artifact import digest_file
from toolchain.recipe import Card


def metadata(card: Card, *, name: str, version: str, source: Path) -> dict[str, Any]:
    """Values by key; `source` is the checkpoint folder, whose weights general.source.uuid stands for."""
    found = {
        "general.name": card.title or name,
        "general.basename": name,
        "general.version": f"v{version}",
        "general.author": card.author,
        "general.organization": card.organization,
        "general.description": card.description,
        "general.url": card.url,
        "general.license.name": card.license_name,
        "general.license.link": card.license_link,
        "general.languages": list(card.languages),
        "general.tags": list(card.tags),
        "general.base_models": [_on_hub(model) for model in card.base_models],
        "general.datasets": [_on_hub(dataset) for dataset in card.datasets],
        "general.quantized_by": card.quantized_by,
        "general.source.uuid": source_uuid(source),
    }
    return {key: value for key, value in found.items() if value}


def _on_hub(name: str) -> dict[str, str]:
    organization, _, last = name.partition("/")
    return {"name": last, "organization": organization, "repo_url": f"https://huggingface.co/{name}"}


def source_uuid(checkpoint: Path) -> str:
    """A UUID (RFC 9562, version 8) from the SHA-256 of the names and bytes of the checkpoint's weights."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        digest.update(path.name.encode() + b"\0")
        digest.update(bytes.fromhex(digest_file(path)))
    raw = bytearray(digest.digest()[:16])
    raw[6], raw[8] = raw[6] & 0x0F | 0x80, raw[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def model_card(card: Card) -> str:
    """README.md whose front matter holds what --metadata cannot say: the licence. JSON is YAML."""
    given = {"license": card.license} if card.license else {}
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in given.items()) + "---\n"
