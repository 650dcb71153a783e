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
_EXAMPLE = '"…"'
_REQUIRED = {
    "name": '"my-model"',
    "teacher.model": '"models/teacher"',
    "data.train": '"data/train.jsonl"',
    "data.held_out": '"data/held_out.jsonl"',
}
_OPTIONAL = {
    "teacher.sha256": '"…"',
    "student.model": '"models/student"',
    "student.keep_layers": "[0, 1, 2, 3]",
    "data.system": '"Answer briefly."',
    "capture.temperatures": "[1.0, 2.0, 4.0]",
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
    keys = [
        _key(f"{name}.{key}", key, field)
        for key, field in model.model_fields.items()
        if next(_models_in(field.annotation), None) is None
    ]
    nested = [
        f"# {key} = {{ " + ", ".join(f"{inner} = {_EXAMPLE}" for inner in sub.model_fields) + " }\n"
        for key, field in model.model_fields.items()
        if (sub := next(_models_in(field.annotation), None)) is not None
    ]
    return f"\n{_wrap(model.__doc__ or '')}[{name}]\n" + "".join(keys) + "".join(nested)


def _key(path: str, key: str, field: FieldInfo) -> str:
    if path in _REQUIRED:
        return _comment(field) + f"{key} = {_REQUIRED[path]}\n"
    if field.default is PydanticUndefined:
        raise AssertionError(f"{path} is required and has no example in template.py")
    shown = _toml(field.default) if field.default is not None else _OPTIONAL[path]
    return _comment(field) + f"# {key} = {shown}\n"


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
