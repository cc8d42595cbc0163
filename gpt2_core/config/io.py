"""Configurations read and written: as YAML, from dicts, and how two of them differ."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gpt2_core.config.checks import in_short
from gpt2_core.config.model import ModelConfig
from gpt2_core.config.train import GROUPS, TrainConfig
from gpt2_core.errors import UserError
from gpt2_core.parsing import read_text, yaml_value


def to_yaml(config: TrainConfig) -> str:
    """The whole configuration as a recipe that `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(path: Path) -> TrainConfig:
    """Read a configuration that `to_yaml` wrote; raises UserError if it isn't one."""
    values = yaml_value(read_text(path), str(path))
    _check_types(values, TrainConfig, str(path))
    for name in GROUPS.keys() & values.keys():
        _check_types(values[name], GROUPS[name], f"{path}: {name}")
    try:
        return from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_yaml_text(text: str) -> TrainConfig:
    """The configuration that `to_yaml` gave this text of."""
    return from_dict(yaml_value(text, "a run's configuration"))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{k: GROUPS[k](**v) if k in GROUPS else v for k, v in values.items()})


def model_from_dict(values: dict[str, Any], source: str) -> ModelConfig:
    """An architecture read from a file; raises UserError, beginning with `source`, for a setting of the wrong type."""
    _check_types(values, ModelConfig, f"{source}: its configuration")
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{source}: its configuration is invalid: {error}") from error


def _check_types(values: Any, kind: type, source: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected settings by name, found {type(values).__name__}")
    kinds = get_type_hints(kind)
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{source} has a setting {name!s:.80}, which nothing here knows")
        if name not in GROUPS and not _is_a(kinds[name], value):
            shown = in_short(repr(value) if isinstance(value, str) else value)
            raise UserError(f"{source} has {name} {shown}, which is not a value it can take")


def _is_a(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value is choice or (value == choice and type(value) is type(choice)) for choice in get_args(kind))
    if get_origin(kind) is dict:
        names, values = get_args(kind)
        return isinstance(value, dict) and all(_is_a(names, k) and _is_a(values, v) for k, v in value.items())
    if get_args(kind):
        return any(_is_a(k, value) for k in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def differences(ours: Any, theirs: Any, ignore: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of each setting in which two configurations differ."""
    for f in dataclasses.fields(ours):
        a, b = getattr(ours, f.name), getattr(theirs, f.name)
        if f.name in ignore or a == b:
            continue
        if dataclasses.is_dataclass(a):
            inside = frozenset(name.partition(".")[2] for name in ignore if name.startswith(f.name + "."))
            yield from ((f"{f.name}.{name}", x, y) for name, x, y in differences(a, b, inside))
        else:
            yield f.name, a, b
