import random

import pytest

from shoal.crdt.kinds import EntryId
from shoal.crdt.sketch import (
    CELL_BYTES,
    CELLS_MIN,
    HASHES,
    SALT_BYTES,
    SHORT_ID_BYTES,
    Sketch,
    SketchDifference,
    count_cells,
    shorten,
)
from shoal.protocol.errors import ProtocolError, Refusal

SALT = b"saltsalt"


def make_ids(count: int, seed: int = 1) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(SHORT_ID_BYTES) for _ in range(count)]


def sketch_of(short_ids: list[bytes], cells: int, salt: bytes = SALT) -> Sketch:
    sketch = Sketch(salt, cells)
    sketch.add(short_ids)
    return sketch


def subtract(own: list[bytes], others: list[bytes], cells: int, salt: bytes = SALT) -> SketchDifference:
    return sketch_of(own, cells, salt).subtract(sketch_of(others, cells, salt).encode())


@pytest.mark.parametrize(("own", "others"), [(0, 0), (1, 0), (0, 1), (3, 4), (50, 0), (200, 300)])
def test_a_sketch_that_is_large_enough_shows_the_difference(own: int, others: int) -> None:
    ids = make_ids(5000 + own + others)
    common, left, right = ids[:5000], ids[5000 : 5000 + own], ids[5000 + own :]
    difference = subtract(common + left, common + right, 2 * count_cells(own + others)).read()
    assert difference is not None
    assert (difference.own, difference.others) == (frozenset(left), frozenset(right))


@pytest.mark.parametrize("count", [1, 2, 5, 20, 100, 500])
def test_the_number_of_cells_is_nearly_always_enough(count: int) -> None:
    trials = 100
    ids = make_ids(count)
    shown = 0
    for trial in range(trials):
        difference = subtract(ids, [], count_cells(count), trial.to_bytes(SALT_BYTES, "big")).read()
        assert difference is None or (difference.own, difference.others) == (frozenset(ids), frozenset())
        shown += difference is not None
    assert shown >= 0.9 * trials


@pytest.mark.parametrize(("own", "others"), [(1000, 0), (0, 1000), (500, 500), (5000, 1000)])
def test_a_sketch_that_is_too_small_says_so_and_tells_by_how_much(own: int, others: int) -> None:
    ids = make_ids(3000 + own + others)
    subtracted = subtract(ids[: 3000 + own], ids[:3000] + ids[3000 + own :], 112)
    assert subtracted.read() is None
    assert 0.6 * (own + others) <= subtracted.estimate(own - others) <= 1.6 * (own + others)


def test_the_estimate_is_never_below_what_one_side_has_more() -> None:
    ids = make_ids(40)
    assert subtract(ids, ids[:10], CELLS_MIN).estimate(30) >= 30


def test_an_encoded_sketch_is_as_long_as_its_cells() -> None:
    sketch = sketch_of(make_ids(700), 24)
    assert len(sketch) == 24
    assert len(sketch.encode()) == 24 * CELL_BYTES


def test_places_depend_on_the_salt() -> None:
    ids = make_ids(30)
    assert sketch_of(ids, 24).encode() != sketch_of(ids, 24, bytes(SALT_BYTES)).encode()
    assert shorten(SALT, EntryId(bytes(32))) != shorten(bytes(SALT_BYTES), EntryId(bytes(32)))
    assert len(shorten(SALT, EntryId(bytes(32)))) == SHORT_ID_BYTES


def test_cells_of_another_length_are_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        sketch_of([], 24).subtract(bytes(CELL_BYTES * 20))
    assert caught.value.refusal is Refusal.WRONG_LENGTH


def test_arbitrary_cells_end_and_are_no_difference() -> None:
    source = random.Random(3)
    for _ in range(200):
        assert sketch_of(make_ids(50), 40).subtract(source.randbytes(40 * CELL_BYTES)).read() is None


def test_cells_that_lead_in_a_circle_end() -> None:
    # One item in one of its cells only: taking it out puts it into the others, and so on.
    sketch = sketch_of([], CELLS_MIN)
    (item,) = make_ids(1)
    cells = bytearray(sketch_of([item], CELLS_MIN).encode())
    filled = next(at for at in range(CELLS_MIN) if any(cells[at * CELL_BYTES : (at + 1) * CELL_BYTES]))
    only = bytearray(len(cells))
    only[filled * CELL_BYTES : (filled + 1) * CELL_BYTES] = cells[filled * CELL_BYTES : (filled + 1) * CELL_BYTES]
    assert sketch.subtract(bytes(only)).read() is None


def test_cells_make_whole_rows() -> None:
    for differences in (0, 0.3, 1, 7, 1000):
        cells = count_cells(differences)
        assert cells % HASHES == 0
        assert cells >= max(CELLS_MIN, differences)
