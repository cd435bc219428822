"""Canonical msgpack under a schema: what a control message may look like, byte for byte.

A message class is a frozen dataclass whose field annotations are its schema: bool, int, float, bytes, str, another
such dataclass, `X | None`, or `tuple[X, ...]`, with bounds by `Annotated[…, Bound(low, high)]`. The wire form is a
flat msgpack array of the fields in order, but for a last one that is `Elided`; a registered message has its type id in
front.

Invariants: decoding raises nothing but ProtocolError; the length is checked before anything is parsed; nothing decodes
that does not encode back to the same bytes (one value, one encoding); floats are finite.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack

from shoal.protocol.errors import ProtocolError, Refusal

MESSAGE_BYTES_MAX = 64 * 1024
DELTA_BYTES_MAX = 256 * 1024
# No array may announce more items: memory is taken for them before they are read, on every level of nesting.
ARRAY_ITEMS_MAX = 4096

T = TypeVar("T")
# The decoded msgpack tree: the one place where a value has no static type yet.
Tree = Any
_Decoder = Callable[[Tree, str], Tree]
_Encoder = Callable[[Tree], Tree]


@dataclass(frozen=True, slots=True)
class Bound:
    """Inclusive limits: of the value of a number, of the length of bytes, text (in UTF-8 bytes) or a tuple."""

    low: float
    high: float

    def holds(self, size: float) -> bool:
        return self.low <= size <= self.high


@dataclass(frozen=True, slots=True)
class Choice:
    """The closed set of values of a text field."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Elided:
    """Of a record's last field: where it has its default value it is left out."""


U16 = Annotated[int, Bound(0, 2**16 - 1)]
U32 = Annotated[int, Bound(0, 2**32 - 1)]
U63 = Annotated[int, Bound(0, 2**63 - 1)]
Bytes32 = Annotated[bytes, Bound(32, 32)]
Bytes64 = Annotated[bytes, Bound(64, 64)]
Text = Annotated[str, Bound(0, 256)]
_DEFAULT_BOUNDS = {int: Bound(-(2**63), 2**63 - 1), bytes: Bound(0, MESSAGE_BYTES_MAX), str: Bound(0, 4096)}
_DEFAULT_COUNT = Bound(0, ARRAY_ITEMS_MAX)


def _fail(where: str, problem: str, refusal: Refusal = Refusal.MALFORMED) -> typing.NoReturn:
    raise ProtocolError(refusal, f"{where}: {problem}")


def _scalar_decoder(kind: type, bound: Bound, choice: Choice | None) -> _Decoder:
    def decode(tree: Tree, where: str) -> Tree:
        given: type = type(tree)
        # bool is a subclass of int; the exact type is what the schema names.
        if given is not kind:
            _fail(where, f"expected {kind.__name__}, got {given.__name__}")
        size: int = tree if kind is int else len(tree.encode() if kind is str else tree)
        if not bound.holds(size):
            what = "value" if kind is int else "length"
            _fail(where, f"{what} {size} is outside {bound.low}..{bound.high}", Refusal.OUT_OF_RANGE)
        if choice and tree not in choice.values:
            _fail(where, f"{tree!r} is none of {', '.join(choice.values)}", Refusal.OUT_OF_RANGE)
        return tree

    return decode


def _decode_bool(tree: Tree, where: str) -> Tree:
    if type(tree) is not bool:
        _fail(where, f"expected bool, got {type(tree).__name__}")
    return tree


def _float_decoder(bound: Bound | None) -> _Decoder:
    def decode(tree: Tree, where: str) -> Tree:
        if type(tree) is not float:
            _fail(where, f"expected float, got {type(tree).__name__}")
        if not math.isfinite(tree):
            _fail(where, "is not finite", Refusal.NOT_FINITE)
        if bound and not bound.holds(tree):
            _fail(where, f"value {tree} is outside {bound.low}..{bound.high}", Refusal.OUT_OF_RANGE)
        return tree

    return decode


def _tuple_codec(item: tuple[_Decoder, _Encoder], bound: Bound) -> tuple[_Decoder, _Encoder]:
    assert bound.high <= ARRAY_ITEMS_MAX, "a longer array cannot be read"
    decode_item, encode_item = item

    def decode(tree: Tree, where: str) -> Tree:
        if type(tree) is not list:
            _fail(where, f"expected array, got {type(tree).__name__}")
        if not bound.holds(len(tree)):
            _fail(where, f"count {len(tree)} is outside {bound.low}..{bound.high}", Refusal.OUT_OF_RANGE)
        return tuple(decode_item(child, f"{where}[{index}]") for index, child in enumerate(tree))

    return decode, lambda value: [encode_item(child) for child in value]


def _is_elided(hint: Tree) -> bool:
    return any(isinstance(extra, Elided) for extra in getattr(hint, "__metadata__", ()))


def _record_codec(cls: type) -> tuple[_Decoder, _Encoder]:
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    codecs = [_codec(hints[name]) for name in names]
    last = dataclasses.fields(cls)[-1] if names and _is_elided(hints[names[-1]]) else None

    def decode(tree: Tree, where: str) -> Tree:
        if last is not None and type(tree) is list and len(tree) == len(names) - 1:
            tree = [*tree, codecs[-1][1](last.default)]
        if type(tree) is not list or len(tree) != len(names):
            _fail(where, f"expected an array of {len(names)} fields")
        values = {
            name: codec[0](child, f"{where}.{name}") for name, codec, child in zip(names, codecs, tree, strict=True)
        }
        try:
            return cls(**values)
        except ValueError as error:
            _fail(where, str(error), Refusal.OUT_OF_RANGE)

    def encode(value: Tree) -> Tree:
        is_short = last is not None and getattr(value, last.name) == last.default
        written = zip(names[:-1], codecs[:-1], strict=True) if is_short else zip(names, codecs, strict=True)
        return [codec[1](getattr(value, name)) for name, codec in written]

    return decode, encode


def _codec(hint: Tree) -> tuple[_Decoder, _Encoder]:
    bound: Bound | None = None
    choice: Choice | None = None
    annotated: Tree = Annotated
    if get_origin(hint) is annotated:
        hint, *extras = get_args(hint)
        bound = next((extra for extra in extras if isinstance(extra, Bound)), None)
        choice = next((extra for extra in extras if isinstance(extra, Choice)), None)
    if hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    origin: Tree = get_origin(hint)
    unions: tuple[Tree, ...] = (typing.Union, types.UnionType)
    if origin in unions:
        (inner,) = [arg for arg in get_args(hint) if arg is not type(None)]
        inner_decode, inner_encode = _codec(inner)
        return (
            lambda tree, where: None if tree is None else inner_decode(tree, where),
            lambda value: None if value is None else inner_encode(value),
        )
    if origin is tuple:
        return _tuple_codec(_codec(get_args(hint)[0]), bound or _DEFAULT_COUNT)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _record_codec(hint)
    if hint is bool:
        return _decode_bool, lambda value: value
    if hint is float:
        return _float_decoder(bound), float
    if hint in _DEFAULT_BOUNDS:
        return _scalar_decoder(hint, bound or _DEFAULT_BOUNDS[hint], choice), lambda value: value
    raise AssertionError(f"no wire form for {hint!r}")


class Schema:
    """A closed set of messages, each with a type id, and their codec."""

    def __init__(self, types_by_id: Mapping[int, type]) -> None:
        self._codecs = {number: _record_codec(cls) for number, cls in types_by_id.items()}
        self._classes = dict(types_by_id)
        self._ids = {cls: number for number, cls in types_by_id.items()}
        assert len(self._ids) == len(self._codecs), "one class, one type id"

    def encode(self, message: object) -> bytes:
        """The canonical bytes of a registered message."""
        number = self._ids[type(message)]
        return _pack([number, self._codecs[number][1](message)])

    def decode_untrusted(self, raw: bytes | memoryview, size_max: int = MESSAGE_BYTES_MAX) -> Tree:
        """The message in `raw`; raises ProtocolError and nothing else."""
        tree = _unpack(raw, size_max)
        if type(tree) is not list or len(tree) != 2 or type(tree[0]) is not int:
            _fail("message", "expected [type, body]")
        if tree[0] not in self._codecs:
            _fail("message", f"unknown type {tree[0]}", Refusal.UNKNOWN_TYPE)
        message = self._codecs[tree[0]][0](tree[1], self._classes[tree[0]].__name__)
        if self.encode(message) != bytes(raw):
            _fail("message", "is not in canonical form", Refusal.NON_CANONICAL)
        return message


def encode_record(value: object) -> bytes:
    """The canonical bytes of one dataclass whose type the reader knows: what is hashed and signed."""
    return _pack(_record_codec_of(type(value))[1](value))


def decode_record_untrusted(cls: type[T], raw: bytes | memoryview, size_max: int = MESSAGE_BYTES_MAX) -> T:
    """The `cls` in `raw`; raises ProtocolError and nothing else."""
    value: T = _record_codec_of(cls)[0](_unpack(raw, size_max), cls.__name__)
    if encode_record(value) != bytes(raw):
        _fail(cls.__name__, "is not in canonical form", Refusal.NON_CANONICAL)
    return value


_RECORD_CODECS: dict[type, tuple[_Decoder, _Encoder]] = {}


def _record_codec_of(cls: type) -> tuple[_Decoder, _Encoder]:
    if cls not in _RECORD_CODECS:
        _RECORD_CODECS[cls] = _record_codec(cls)
    return _RECORD_CODECS[cls]


def _pack(tree: Tree) -> bytes:
    packed = msgpack.packb(tree, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def _unpack(raw: bytes | memoryview, size_max: int) -> Tree:
    if len(raw) > size_max:
        raise ProtocolError(Refusal.OVERSIZED, f"{len(raw)} bytes, at most {size_max}")
    try:
        tree = msgpack.unpackb(raw, raw=False, max_array_len=ARRAY_ITEMS_MAX, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(Refusal.MALFORMED, f"not msgpack: {type(error).__name__}") from error
    return tree
