"""`toolchain init`: a commented recipe with every key and its default, read off the models so that it cannot drift."""

import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from toolchain.recipe import Recipe
from toolchain.settings import Settings, _models_in

_HEAD = """\
# A recipe: one teacher, one student, one way to the device. Read by `toolchain plan` and `toolchain run`.
# Paths are relative to this file. A key behind `#` shows its default; a misspelt key stops the run.
"""
_REQUIRED = {
    "name": '"my-model"',
    "teacher.model": '"models/teacher"',
    "teacher.endpoint.url": '"http://localhost:8000/v1"',
    "teacher.endpoint.model": '"teacher-name"',
    "data.train": '"data/train.jsonl"',
    "data.held_out": '"data/held_out.jsonl"',
}
_OPTIONAL = {
    "select.max_answer_tokens": "200",
    "select.embedding_model": '"models/all-MiniLM-L6-v2"',
    "distill.gradient_checkpointing": "true",
    "compare.questions": "200",
    "compare.max_new_tokens": "256",
    "compare.embedding_model": '"models/all-MiniLM-L6-v2"',
    "compare.out_of_domain": '"data/general.jsonl"',
    "teacher.sha256": '"…"',
    "teacher.special_tokens.bos": '"<s>"',
    "teacher.special_tokens.eos": '"</s>"',
    "teacher.special_tokens.pad": '"<pad>"',
    "teacher.special_tokens.unk": '"<unk>"',
    "teacher.endpoint.requests_per_minute": "60",
    "teacher.endpoint.tokens_per_minute": "100_000",
    "teacher.endpoint.input_price": "0.5",
    "teacher.endpoint.output_price": "1.5",
    "teacher.endpoint.max_cost": "20.0",
    "bundle.base.x86_64": '"base-amd64.tar"',
    "bundle.base.aarch64": '"base-arm64.tar"',
    "student.model": '"models/student"',
    "student.keep_layers": "[0, 1, 2, 3]",
    "data.system": '"Answer briefly."',
    "capture.temperatures": "[1.0, 2.0, 4.0]",
    "card.title": '"Demo 135M"',
    "card.author": '"A. Author"',
    "card.organization": '"Example"',
    "card.description": '"Answers questions about the command line."',
    "card.url": '"https://example.org/demo"',
    "card.license": '"apache-2.0"',
    "card.license_name": '"Example licence"',
    "card.license_link": '"https://example.org/licence"',
    "card.quantized_by": '"Example"',
    "imatrix.file": '"models/imatrix.gguf"',
    "quantize.target_bytes": "100000000",
    "quantize.target_bits": "4.5",
    "quantize.plan": '"plan.txt"',
}


def recipe_template() -> str:
    """TOML text; with its four required values set it is a valid recipe."""
    plain, tables = [_HEAD], []
    for name, field in Recipe.model_fields.items():
        model = next(_models_in(field.annotation), None)
        if model is None:
            plain.append(_key(name, name, field))
        else:
            assert issubclass(model, Settings)
            tables.append(_table(name, model))
    return "".join(plain) + "".join(tables)


def _table(name: str, model: type[Settings]) -> str:
    keys, nested = [], []
    for key, field in model.model_fields.items():
        inner = next(_models_in(field.annotation), None)
        if inner is None:
            keys.append(_key(f"{name}.{key}", key, field))
        else:
            assert issubclass(inner, Settings)
            nested.append(_commented(f"{name}.{key}", inner))
    return f"\n{_wrap(model.__doc__ or '')}[{name}]\n" + "".join(keys) + "".join(nested)


def _commented(name: str, model: type[Settings]) -> str:
    """A table inside a table, which most recipes do without: to use it, uncomment its header and what it needs."""
    keys = [
        _comment(field) + f"# {key} = {_REQUIRED.get(f'{name}.{key}') or _shown(f'{name}.{key}', field)}\n"
        for key, field in model.model_fields.items()
    ]
    return f"\n{_wrap(model.__doc__ or '')}# [{name}]\n" + "".join(keys)


def _key(path: str, key: str, field: FieldInfo) -> str:
    if path in _REQUIRED:
        return _comment(field) + f"{key} = {_REQUIRED[path]}\n"
    return _comment(field) + f"# {key} = {_shown(path, field)}\n"


def _shown(path: str, field: FieldInfo) -> str:
    """The default, or an example of what has none."""
    if field.default is PydanticUndefined:
        raise AssertionError(f"{path} is required and has no example in template.py")
    return _toml(field.default) if field.default is not None else _OPTIONAL[path]


def _comment(field: FieldInfo) -> str:
    return _wrap(field.description) if field.description else ""


def _wrap(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), 110)
    return "".join(f"# {line}\n" for line in lines)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Path):
        return json.dumps(str(value))
    return json.dumps(value, ensure_ascii=False)
