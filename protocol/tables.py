"""Tables that a person wrote (TOML) into frozen dataclasses: one reader for manifests and node configurations.

The field annotations are the schema, with `Bound` and `Choice` as in protocol.wire; field defaults are the defaults.
Invariant: a bad value is refused with an InputError that names the field, the line where it stands and the fix.
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from shoal.protocol.errors import InputError
from shoal.protocol.wire import Bound, Choice

T = TypeVar("T")
Error = type[InputError]


def parse_toml(text: str, error: Error) -> dict[str, Any]:
    """The document's tables; raises `error` with the place where the syntax breaks."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise error("TOML", f"{problem}", "mend the syntax there; strings want quotes") from problem


def read_table(cls: type[T], table: Mapping[str, Any], where: str, text: str, error: Error) -> T:
    """A `cls` from one table of the document `text`; nested dataclasses are sub-tables."""
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    for key in table:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise error(locate(text, where, key), "is no known field", f"remove it, or use one of: {known}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in table:
            values[name] = _read_value(hints[name], table[name], (where, name), text, error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(
                _join(where, name), "is missing", f"add {name} = … to [{where}]" if where else f"add {name} = …"
            )
    return cls(**values)


def _read_value(hint: Any, value: Any, at: tuple[str, str], text: str, error: Error) -> Any:
    extras: tuple[Any, ...] = ()
    annotated: Any = Annotated
    hint = _strip_optional(hint)  # of either order: what is annotated may be optional, or the other way round
    if get_origin(hint) is annotated:
        hint, *rest = get_args(hint)
        extras = tuple(rest)
    hint = _strip_optional(hint)
    place = locate(text, *at)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise error(place, "is not a table", f"write it as [{_join(*at)}]")
        read: Any = read_table(hint, value, _join(*at), text, error)
        return read
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise error(place, "is not a list of strings", 'write it as ["…", "…"]')
        _check_bounds(len(value), "entries", extras, place, error)
        return tuple(value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise error(place, f"is {type(value).__name__}, not {hint.__name__}", f"write a {_EXAMPLES[hint]}")
    for extra in extras:
        if isinstance(extra, Choice) and value not in extra.values:
            raise error(place, f"{value!r} is not allowed", f"use one of: {', '.join(extra.values)}")
    if hint in (int, float):
        _check_bounds(value, "", extras, place, error)
    elif hint is str:
        _check_bounds(len(value.encode()), "bytes", extras, place, error)
    return value


_EXAMPLES: dict[type, str] = {int: "whole number", float: "number", str: "quoted string", bool: "true or false"}


def _strip_optional(hint: Any) -> Any:
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    is_union = get_origin(hint) is typing.Union or type(hint).__name__ == "UnionType"
    return arguments[0] if is_union and len(arguments) == 1 else hint


def _check_bounds(size: float, unit: str, extras: tuple[Any, ...], place: str, error: Error) -> None:
    for extra in extras:
        if isinstance(extra, Bound) and not extra.holds(size):
            given, low, high = (int(one) if float(one).is_integer() else one for one in (size, extra.low, extra.high))
            raise error(place, f"{given} {unit}".rstrip() + " is out of range", f"use {low} to {high}")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def locate(text: str, where: str, name: str) -> str:
    """`field (line n)`, or `field` where it has no line; found by a plain scan, because tomllib keeps no positions."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped.partition("#")[0].strip().strip("[]").strip()
            if section == _join(where, name):
                return f"{_join(where, name)} (line {number})"
        elif section == where and stripped.partition("=")[0].strip() == name:
            return f"{_join(where, name)} (line {number})"
    return _join(where, name)
