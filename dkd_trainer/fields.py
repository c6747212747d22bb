"""Fields of a settings dataclass: what a value may be, how a TOML table becomes one, and the way back."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from dha.config import ConfigError

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting is unknown or out of range; the message has its name, the value found and what is allowed."""


def rule(default: Any, accepts: Callable[[Any], bool], allowed: str) -> Any:
    """A dataclass field that takes only values that `accepts` says yes to; `allowed` describes them."""
    return dataclasses.field(default=default, metadata={"accepts": accepts, "allowed": allowed})


def whole(default: int, low: int = 0) -> Any:
    return rule(default, lambda v: type(v) is int and v >= low, f"a whole number from {low}")


def real(default: float, low: float = 0.0, high: float = math.inf, above: bool = False) -> Any:
    """A number from `low` (greater than `low` if `above`) to `high`."""
    start = f"greater than {low:g}" if above else f"from {low:g}"
    allowed = f"a number {start}" + ("" if high == math.inf else f" to {high:g}")
    return rule(default, lambda v: is_real(v) and (v > low if above else v >= low) and v <= high, allowed)


def reals(default: tuple[float, ...], lengths: tuple[int, ...], low: float = 0.0, what: str = "numbers") -> Any:
    """A list of numbers from `low`, of one of `lengths`, any length above 0 if there are none."""

    def accepts(value: Any) -> bool:
        fits = len(value) in lengths if lengths else len(value) > 0
        return fits and all(is_real(v) and v >= low for v in value)

    return rule(default, lambda v: isinstance(v, tuple) and accepts(v), f"{what}, each from {low:g}")


def choice(default: str, *names: str) -> Any:
    return rule(default, lambda v: v in names, "one of " + ", ".join(map(repr, names)))


def switch(default: bool) -> Any:
    return rule(default, lambda v: type(v) is bool, "true or false")


def text(default: str = "") -> Any:
    return rule(default, lambda v: isinstance(v, str), "a text")


def texts() -> Any:
    """A list of texts, empty by default."""
    return rule((), lambda v: isinstance(v, tuple) and all(isinstance(t, str) and t for t in v), "a list of texts")


def is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", root: type | None = None) -> T:
    """A dataclass, nested ones included, from a table; what is absent keeps its default. Raises SettingsError."""
    root = root or cls
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_setting(prefix + name, root)
        given[name] = read_field(known[name], value, prefix + name, root)
    try:
        return cls(**given)
    except (ConfigError, TypeError) as error:
        raise SettingsError(f"[{prefix.rstrip('.')}] {error}") from error


def unknown_setting(name: str, root: type) -> SettingsError:
    """The error for a name that no setting has, with the nearest one that exists."""
    names = list(list_names(root))
    near = get_close_matches(name, names, n=1, cutoff=0.0) or names[:1]
    return SettingsError(f"unknown setting {name!r}; the nearest that exists is {near[0]!r}")


def list_names(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from list_names(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + field.name


def read_field(field: dataclasses.Field, value: Any, name: str, root: type) -> Any:
    """A checked value for one field: lists become tuples, whole numbers become floats where a float is meant."""
    if dataclasses.is_dataclass(field.type):
        if not isinstance(value, Mapping):
            raise SettingsError(f"setting {name!r} is {value!r}, expected a table of settings")
        return build(field.type, value, f"{name}.", root)  # type: ignore[arg-type]
    if isinstance(field.default, tuple):
        if not isinstance(value, (list, tuple)):
            raise SettingsError(f"setting {name!r} is {value!r}, expected a list")
        value = tuple(value)
    if isinstance(field.default, float) and type(value) is int:
        value = float(value)
    if "accepts" in field.metadata and not field.metadata["accepts"](value):
        raise SettingsError(f"setting {name!r} is {value!r}, expected {field.metadata['allowed']}")
    return value


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables as one; where both have a value, the second's."""
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def nest(name: str, value: Any) -> dict[str, Any]:
    """`nest("a.b", 1)` is `{"a": {"b": 1}}`."""
    first, _, rest = name.partition(".")
    return {first: nest(rest, value) if rest else value}


def to_toml(values: Mapping[str, Any]) -> str:
    """A table of plain values and of tables of plain values as TOML text."""
    lines = [f"{name} = {toml_value(value)}" for name, value in values.items() if not isinstance(value, Mapping)]
    for name, table in values.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def toml_value(value: Any) -> str:
    """Text, number, truth value or list; JSON's text is TOML's but for surrogate pairs and the delete character."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
