"""Canonical msgpack under a schema: what is refused, with the field that is wrong, and that one value has one form."""

from dataclasses import dataclass
from typing import Annotated, NewType

import msgpack
import pytest

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.wire import (
    MESSAGE_BYTES_MAX,
    U16,
    U63,
    Bound,
    Bytes32,
    Choice,
    Schema,
    Text,
    decode_record_untrusted,
    encode_record,
)

Tag = NewType("Tag", bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    x: int
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: Annotated[str, Bound(1, 8)]
    colour: Annotated[str, Choice(("red", "blue"))]
    tag: Annotated[Tag, Bound(2, 4)]
    points: Annotated[tuple[Point, ...], Bound(1, 3)]
    centre: Point | None
    filled: bool
    width: Annotated[float, Bound(0, 10)]
    copies: U16


@dataclass(frozen=True, slots=True, kw_only=True)
class Even:
    value: int

    def __post_init__(self) -> None:
        if self.value % 2:
            raise ValueError("value is odd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    number: int
    raw: bytes
    text: str
    items: tuple[U63, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    pass


SHAPE = Shape(
    name="a",
    colour="red",
    tag=Tag(b"tt"),
    points=(Point(x=-1, y=0.5), Point(x=2**62, y=-0.0)),
    centre=None,
    filled=True,
    width=1.0,
    copies=3,
)
TREE = ["a", "red", b"tt", [[-1, 0.5], [2**62, -0.0]], None, True, 1.0, 3]
NAMES = ["name", "colour", "tag", "points", "centre", "filled", "width", "copies"]
SCHEMA = Schema({1: Point, 2: Shape, 7: Ping})


def pack(tree: object) -> bytes:
    raw = msgpack.packb(tree)
    assert isinstance(raw, bytes)
    return raw


def refuse(cls: type, raw: bytes, size_max: int = MESSAGE_BYTES_MAX) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decode_record_untrusted(cls, raw, size_max)
    return caught.value


def test_a_record_is_the_flat_array_of_its_fields() -> None:
    assert encode_record(SHAPE) == pack(TREE)
    assert decode_record_untrusted(Shape, pack(TREE)) == SHAPE
    assert decode_record_untrusted(Shape, memoryview(pack(TREE))) == SHAPE
    assert isinstance(decode_record_untrusted(Shape, pack(TREE)).points, tuple)


def test_an_optional_record_may_stand_there() -> None:
    tree = [*TREE]
    tree[4] = [5, 6.0]
    assert decode_record_untrusted(Shape, pack(tree)).centre == Point(x=5, y=6.0)


@pytest.mark.parametrize(
    ("field", "value", "refusal", "words"),
    [
        ("name", 1, Refusal.MALFORMED, "expected str, got int"),
        ("name", b"a", Refusal.MALFORMED, "expected str, got bytes"),
        ("name", "", Refusal.OUT_OF_RANGE, "length 0 is outside 1..8"),
        ("name", "ééééé", Refusal.OUT_OF_RANGE, "length 10 is outside"),
        ("colour", "green", Refusal.OUT_OF_RANGE, "none of red, blue"),
        ("tag", "tt", Refusal.MALFORMED, "expected bytes, got str"),
        ("tag", b"t", Refusal.OUT_OF_RANGE, "length 1"),
        ("tag", b"ttttt", Refusal.OUT_OF_RANGE, "length 5"),
        ("points", [], Refusal.OUT_OF_RANGE, "count 0"),
        ("points", [[0, 0.0]] * 4, Refusal.OUT_OF_RANGE, "count 4"),
        ("points", {}, Refusal.MALFORMED, "expected array, got dict"),
        ("points", None, Refusal.MALFORMED, "expected array, got NoneType"),
        ("filled", 1, Refusal.MALFORMED, "expected bool, got int"),
        ("filled", None, Refusal.MALFORMED, "expected bool"),
        ("width", 1, Refusal.MALFORMED, "expected float, got int"),
        ("width", float("nan"), Refusal.NOT_FINITE, "not finite"),
        ("width", float("-inf"), Refusal.NOT_FINITE, "not finite"),
        ("width", 10.5, Refusal.OUT_OF_RANGE, "value 10.5"),
        ("width", -0.5, Refusal.OUT_OF_RANGE, "value -0.5"),
        ("copies", True, Refusal.MALFORMED, "expected int, got bool"),
        ("copies", -1, Refusal.OUT_OF_RANGE, "value -1"),
        ("copies", 2**16, Refusal.OUT_OF_RANGE, "value 65536"),
        ("copies", 3.0, Refusal.MALFORMED, "expected int, got float"),
    ],
)
def test_a_bad_field_is_refused_by_its_name(field: str, value: object, refusal: Refusal, words: str) -> None:
    tree = [*TREE]
    tree[NAMES.index(field)] = value
    error = refuse(Shape, pack(tree))
    assert error.refusal is refusal
    assert error.detail.startswith(f"Shape.{field}: ")
    assert words in error.detail


def test_a_bad_item_is_refused_by_its_place() -> None:
    tree = [*TREE]
    tree[3] = [[0, 0.0], [1, "x"]]
    assert refuse(Shape, pack(tree)).detail.startswith("Shape.points[1].y: expected float")
    tree[3] = [[0, 0.0], [1]]
    assert refuse(Shape, pack(tree)).detail == "Shape.points[1]: expected an array of 2 fields"


@pytest.mark.parametrize("tree", [TREE[:-1], [*TREE, 0], None, 5, "Shape", b"Shape", {}, []])
def test_what_is_no_such_record_is_refused(tree: object) -> None:
    error = refuse(Shape, pack(tree))
    assert error.refusal is Refusal.MALFORMED
    assert error.detail == "Shape: expected an array of 8 fields"


def test_a_record_that_contradicts_itself_is_refused() -> None:
    assert decode_record_untrusted(Even, pack([4])) == Even(value=4)
    error = refuse(Even, pack([5]))
    assert (error.refusal, error.detail) == (Refusal.OUT_OF_RANGE, "Even: value is odd")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x92",  # an array of two, and nothing after it
        pack([1, 2.0]) + b"\x00",
        b"\xc1",  # never used by msgpack
        b"\xa2\xff\xfe",  # text that is no UTF-8
        b"\x81\x01\x02",  # a map
        b"\xd4\x01\x00",  # an extension
        b"\xd6\xff\x00\x00\x00\x00",  # a timestamp
        b"\xdd\xff\xff\xff\xff",  # four thousand million items are announced
        b"\xc6\xff\xff\xff\xff",  # or as many bytes
        b"\x91" * 5000,
        b"\xdc\xff\xff" * 20000,
    ],
)
def test_what_is_no_msgpack_of_ours_is_refused(raw: bytes) -> None:
    assert refuse(Point, raw).refusal is Refusal.MALFORMED


@pytest.mark.parametrize(
    "raw",
    [
        b"\x92\xcc\x05\xcb" + bytes(8),  # 5 in two bytes
        b"\x92\xd0\x05\xcb" + bytes(8),  # 5 as a signed byte
        b"\x92\x05\xca" + bytes(4),  # a single-precision float
        b"\xdc\x00\x02\x05\xcb" + bytes(8),  # a long header for a short array
    ],
)
def test_a_second_form_of_the_same_value_is_refused(raw: bytes) -> None:
    assert refuse(Point, raw).refusal is Refusal.NON_CANONICAL
    assert decode_record_untrusted(Point, b"\x92\x05\xcb" + bytes(8)) == Point(x=5, y=0.0)


def test_the_size_is_checked_before_anything_is_parsed() -> None:
    error = refuse(Point, b"\xc1" * 11, size_max=10)
    assert (error.refusal, error.detail) == (Refusal.OVERSIZED, "11 bytes, at most 10")
    assert refuse(Point, b"\xc1" * (MESSAGE_BYTES_MAX + 1)).refusal is Refusal.OVERSIZED
    assert refuse(Point, b"\xc1" * MESSAGE_BYTES_MAX).refusal is Refusal.MALFORMED


def test_fields_without_bounds_have_default_ones() -> None:
    good = [-(2**63), bytes(MESSAGE_BYTES_MAX), "x" * 4096, [0] * 4096]
    size_max = 10 * MESSAGE_BYTES_MAX
    assert decode_record_untrusted(Loose, pack(good), size_max).text == "x" * 4096
    too_much: list[object] = [2**63, bytes(MESSAGE_BYTES_MAX + 1), "x" * 4097, [0] * 4097]
    for at, value in enumerate(too_much):
        assert refuse(Loose, pack([*good[:at], value, *good[at + 1 :]]), size_max).refusal in (
            Refusal.OUT_OF_RANGE,
            Refusal.MALFORMED,
        )


def test_a_message_has_its_type_in_front() -> None:
    assert SCHEMA.encode(Point(x=1, y=2.0)) == pack([1, [1, 2.0]])
    assert SCHEMA.encode(Ping()) == pack([7, []])
    for message in (Point(x=1, y=2.0), SHAPE, Ping()):
        assert SCHEMA.decode_untrusted(SCHEMA.encode(message)) == message


@pytest.mark.parametrize(
    ("tree", "refusal"),
    [
        ([3, [1, 2.0]], Refusal.UNKNOWN_TYPE),
        ([-1, []], Refusal.UNKNOWN_TYPE),
        ([True, [1, 2.0]], Refusal.MALFORMED),
        (["1", [1, 2.0]], Refusal.MALFORMED),
        ([1], Refusal.MALFORMED),
        ([1, [1, 2.0], 0], Refusal.MALFORMED),
        ([[1], []], Refusal.MALFORMED),
        (None, Refusal.MALFORMED),
        ([7, [0]], Refusal.MALFORMED),
    ],
)
def test_what_is_no_message_is_refused(tree: object, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        SCHEMA.decode_untrusted(pack(tree))
    assert caught.value.refusal is refusal


def test_a_message_in_a_second_form_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        SCHEMA.decode_untrusted(b"\x92\xcc\x07\x90")
    assert caught.value.refusal is Refusal.NON_CANONICAL


def test_a_message_error_names_its_class_and_field() -> None:
    with pytest.raises(ProtocolError, match=r"Point\.y: expected float"):
        SCHEMA.decode_untrusted(pack([1, [1, 2]]))


def test_only_registered_classes_are_messages() -> None:
    with pytest.raises(KeyError):
        SCHEMA.encode(Even(value=2))


def test_a_schema_with_an_unknown_kind_of_field_is_a_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        values: dict[str, int]

    with pytest.raises(AssertionError, match="no wire form"):
        Schema({1: Odd})
    with pytest.raises(AssertionError, match="one class, one type id"):
        Schema({1: Point, 2: Point})


def test_bounds_are_inclusive() -> None:
    bound = Bound(1, 3)
    assert [bound.holds(size) for size in (0, 1, 3, 4)] == [False, True, True, False]
    assert Text.__metadata__[0].holds(256) and not Text.__metadata__[0].holds(257)
    assert Bytes32.__metadata__[0] == Bound(32, 32)
