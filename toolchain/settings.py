"""Strict, frozen settings read from TOML: shared by Recipe and TargetProfile.

An unknown key, a wrong type, a value out of range or a missing file stops the run with the path of the key.
"""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from toolchain.errors import RecipeError


class Settings(BaseModel):
    """Base of everything that is read from TOML: no unknown key, no coercion, no change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def _from_file_location(path: Path, info: ValidationInfo) -> Path:
    """Paths in a file are relative to that file and must exist; without a file they are taken as they are."""
    base: Path | None = (info.context or {}).get("base")
    if base is None:
        return path
    full = (base / path.expanduser()).resolve()
    if not full.exists():
        raise ValueError(f"no such file or folder: {full}")
    return full


ExistingPath = Annotated[Path, AfterValidator(_from_file_location)]


@dataclass(frozen=True)
class _Operational:
    pass


OPERATIONAL = _Operational()
"""Marks a key that says how something is obtained and not what: it is not part of a fingerprint."""


def without_operational(value: Any) -> Any:
    """The same settings with every operational key at its default."""
    if not isinstance(value, Settings):
        return value
    update = {
        name: field.default if OPERATIONAL in field.metadata else without_operational(getattr(value, name))
        for name, field in type(value).model_fields.items()
        if OPERATIONAL in field.metadata or isinstance(getattr(value, name), Settings)
    }
    return value.model_copy(update=update)


S = TypeVar("S", bound=Settings)


def read_toml(path: Path, model: type[S], *, keys: str, overrides: typing.Mapping[str, Any] | None = None) -> S:
    """Read `path` as `model`. `overrides` maps dotted keys ("distill.epochs") to values.

    Raises RecipeError, whose hint for a missing file or key is `keys`: what shows all there are.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file", hint=keys) from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder, not a TOML file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start})", hint="save the file as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for key, value in (overrides or {}).items():
        _put(raw, key, value)
    try:
        text = json.dumps(raw, default=_not_json)
        return model.model_validate_json(text, context={"base": path.resolve().parent})
    except ValidationError as error:
        raise _explain(path, model, error, keys) from None


def _put(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
        if not isinstance(raw, dict):
            raise RecipeError(f"--set {dotted}: '{parent}' is not a table")
    raw[last] = value


def _not_json(value: object) -> str:
    raise RecipeError(f"a TOML value of type {type(value).__name__} is not used here: {value}")


def _explain(path: Path, model: type[Settings], error: ValidationError, keys: str) -> RecipeError:
    """One message with a line per problem; the hint names the nearest key, whatever else is wrong."""
    lines: list[str] = []
    meant: str | None = None
    hint: str | None = None
    for problem in error.errors(include_url=False):
        location = [part for part in problem["loc"] if part != "function-after"]
        where = ".".join(str(part) for part in location)
        if problem["type"] == "extra_forbidden":
            *parents, key = location
            known = known_keys(model, [str(part) for part in parents])
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            table = ".".join(str(part) for part in parents)
            lines.append((f"{table}: " if table else "") + f"unknown key '{key}'")
            those = f"known keys: {', '.join(sorted(known))}"
            meant = meant or (f"did you mean '{near[0]}'? {those}" if near else None)
            hint = hint or those
        elif problem["type"] == "missing":
            lines.append(f"{where}: is missing")
            hint = hint or f"add `{location[-1]} = …`; {keys}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            shown = "" if isinstance(given, dict | list) else f" (got {json.dumps(given, default=str)})"
            lines.append((f"{where}: " if where else "") + message[:1].lower() + message[1:] + shown)
            if "no such file" in message:
                hint = hint or f"paths are relative to {path.parent}"
    return RecipeError(f"{path}: " + f"\n{path}: ".join(lines), hint=meant or hint)


def known_keys(model: type[BaseModel], parents: list[str]) -> list[str]:
    """The keys of the table at `parents`, found through the annotations."""
    current: type[BaseModel] | None = model
    for parent in parents:
        if parent.isdigit():
            continue
        field = current.model_fields.get(parent) if current else None
        current = next(_models_in(field.annotation), None) if field else None
    return list(current.model_fields) if current else []


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict, Annotated):
        for part in typing.get_args(annotation):
            yield from _models_in(part)
