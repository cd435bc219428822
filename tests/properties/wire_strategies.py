"""Values of any record class, drawn from its annotations, and bytes that are nearly such a value."""

import dataclasses
import types
import typing
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack
from hypothesis import strategies as st

from shoal.protocol.wire import Bound, Choice

T = TypeVar("T")
# Longer tuples and byte strings show nothing new, and take long.
COUNT_MAX = 3
LENGTH_MAX = 40
_WIDEST = {int: Bound(-(2**63), 2**63 - 1), float: Bound(-1e300, 1e300)}


def records(cls: type[T]) -> st.SearchStrategy[T]:
    """Instances of a record class, every field within its bounds."""
    hints = get_type_hints(cls, include_extras=True)
    fields = {field.name: _values(hints[field.name]) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return st.builds(cls, **fields)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    extras: tuple[Any, ...] = ()
    annotated: Any = Annotated
    if get_origin(hint) is annotated:
        hint, *rest = get_args(hint)
        extras = tuple(rest)
    hint = getattr(hint, "__supertype__", hint)
    bound = next((extra for extra in extras if isinstance(extra, Bound)), None)
    choice = next((extra for extra in extras if isinstance(extra, Choice)), None)
    if choice is not None:
        return st.sampled_from(choice.values)
    origin: Any = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [one for one in get_args(hint) if one is not type(None)]
        return st.none() | _values(inner)
    if origin is tuple:
        low, high = _sizes(bound, COUNT_MAX)
        return st.lists(_values(get_args(hint)[0]), min_size=low, max_size=high).map(tuple)
    if dataclasses.is_dataclass(hint):
        return records(hint)  # type: ignore[arg-type]  # a class, not an instance
    return _scalars(hint, bound)


def _scalars(kind: Any, bound: Bound | None) -> st.SearchStrategy[Any]:
    if kind is bool:
        return st.booleans()
    if kind is int:
        limits = bound or _WIDEST[int]
        return st.integers(int(limits.low), int(limits.high))
    if kind is float:
        limits = bound or _WIDEST[float]
        return st.floats(float(limits.low), float(limits.high), allow_nan=False, allow_infinity=False)
    low, high = _sizes(bound, LENGTH_MAX)
    if kind is bytes:
        return st.binary(min_size=low, max_size=high)
    assert kind is str, kind
    return st.text(st.characters(codec="utf-8"), min_size=low, max_size=high).filter(
        lambda text: bound is None or bound.holds(len(text.encode()))
    )


def _sizes(bound: Bound | None, usual: int) -> tuple[int, int]:
    low, high = (int(bound.low), int(bound.high)) if bound else (0, usual)
    return low, max(low, min(high, usual))


def mutated(raws: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Bytes that differ from good ones in a few places: flipped, cut out, put in, or at the end."""
    return st.builds(_mutate, raws, st.lists(st.tuples(st.sampled_from("fdia"), st.integers(0), st.binary(max_size=6))))


def _mutate(raw: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, piece in edits:
        place = at % (len(raw) + 1)
        if kind == "f" and place < len(raw):
            raw = raw[:place] + bytes([raw[place] ^ (1 + at % 255)]) + raw[place + 1 :]
        elif kind == "d":
            raw = raw[:place] + raw[place + 1 + len(piece) :]
        elif kind == "i":
            raw = raw[:place] + piece + raw[place:]
        elif kind == "a":
            raw = raw + piece
    return raw


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.binary(max_size=70),
)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
# What parses but need not mean anything.
packed: st.SearchStrategy[bytes] = trees.map(msgpack.packb)
