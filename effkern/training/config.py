"""Configurations as TOML files, read into frozen dataclasses: every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ConfigError", "check", "defaults_of", "load_config", "parse_config", "read_toml", "with_settings"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration names a key that is not there, or gives one a value it cannot have."""


def check(config: Any, **rules: tuple[bool, str]) -> None:
    """Refuse values of a dataclass, by name: whether each is as it must be, and how that is.

    Raises:
        ValueError: for the first that is not.

    >>> from effkern.training import Recipe
    >>> check(Recipe(epochs=3), epochs=(False, "even"))
    Traceback (most recent call last):
    ValueError: epochs: must be even, got 3
    """
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{name}: must be {rule}, got {getattr(config, name)}")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: if it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error


def load_config(cls: type[T], path: Path, settings: Sequence[str] = ()) -> T:
    """The configuration in ``path`` as an instance of the dataclass ``cls``.

    Args:
        cls: a dataclass; fields that are dataclasses are tables of the file.
        path: a TOML file.
        settings: ``"table.key=value"``, each replacing one value; see :func:`with_settings`.

    Raises:
        ConfigError: naming the file, the key and, where one is alike, the key that was probably meant.
    """
    try:
        return parse_config(cls, with_settings(read_toml(path), settings))
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """``values`` with single ones replaced; a value is TOML, or a bare word for a string.

    >>> with_settings({"train": {"lr": 0.1}}, ["train.lr=0.2", "train.schedule=step"])
    {'train': {'lr': 0.2, 'schedule': 'step'}}
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        *tables, key = name.strip().split(".")
        if not equals or not key:
            raise ConfigError(f"setting {setting!r}: must be key=value, as in train.lr=0.1")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        place = result
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"setting {setting!r}: {table} is a value and has no keys")
        place[key] = value
    return result


def parse_config(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """``values`` as an instance of the dataclass ``cls``.

    Raises:
        ConfigError: for an unknown or missing key, a value of another type, or one the dataclass itself refuses.
    """
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1, 0.5)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(fields)}"
            raise ConfigError(f"unknown key {where}{key}{hint}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing")
    given = {key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()}
    try:
        return cls(**given)  # type: ignore[return-value]
    except ValueError as error:
        raise ConfigError(f"{where}{error}") from error


def defaults_of(config: Any) -> dict[str, Any]:
    """What the fields of a configuration have where nothing is said, nested like ``dataclasses.asdict``.

    >>> from effkern.training import Recipe
    >>> defaults_of(Recipe(epochs=3, lr=0.5))["lr"]
    0.1
    """
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = defaults_of(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _convert(kind: Any, value: Any, name: str) -> Any:
    """``value`` as ``kind``; TOML has no tuples, and writes whole floats as integers."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return parse_config(typing.cast(type, kind), value, f"{name}.")
    if origin in (Union, types.UnionType):
        for option in arguments:
            if option is not type(None):
                try:
                    return _convert(option, value, name)
                except ConfigError:
                    if option == [a for a in arguments if a is not type(None)][-1]:
                        raise
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a table, got {value!r}")
        return _finite(dict(value), name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return _finite(value, name)


def _finite(value: Any, name: str) -> Any:
    """TOML has nan and inf, which pass many a comparison and which no result file can hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    return value
