"""Memory that is used again, and never while anybody looks at it."""

import gc
from pathlib import Path

import numpy as np
import pytest

from shoal.node.payload_memory import PIECE_BYTES, PayloadMemory

LARGE = PIECE_BYTES  # a piece of its own
SMALL = PIECE_BYTES // 16
STATUS = Path("/proc/self/status")


def address_of(place: memoryview) -> int:
    return int(np.frombuffer(place, np.uint8).__array_interface__["data"][0])


def test_places_that_are_taken_do_not_overlap() -> None:
    memory = PayloadMemory()
    places = [memory.take(SMALL) for _ in range(40)] + [memory.take(LARGE) for _ in range(3)]
    for number, place in enumerate(places):
        place[:] = bytes([number]) * place.nbytes
    for number, place in enumerate(places):
        assert place.tobytes() == bytes([number]) * place.nbytes


def test_a_piece_is_used_again_when_nobody_views_it() -> None:
    memory = PayloadMemory()
    place = memory.take(LARGE)
    before = address_of(place)
    assert memory.kept_bytes == 0
    del place
    assert memory.kept_bytes == LARGE
    assert address_of(memory.take(LARGE)) == before
    assert memory.kept_bytes == LARGE  # that one is dropped, too


@pytest.mark.parametrize(
    "view",
    [
        lambda place: place[10:20],
        lambda place: place.toreadonly(),
        lambda place: place.cast("B")[1:],
        lambda place: np.frombuffer(place, np.float32)[5:6],
        lambda place: memoryview(np.frombuffer(place, np.uint8)),
    ],
)
def test_a_view_of_any_kind_keeps_the_whole_piece(view: object) -> None:
    memory = PayloadMemory()
    place = memory.take(LARGE)
    place[:] = b"\x07" * LARGE
    assert callable(view)
    kept = view(place)
    del place
    gc.collect()
    assert memory.kept_bytes == 0
    other = memory.take(LARGE)
    other[:] = bytes(LARGE)
    assert bytes(memoryview(kept).cast("B")) == b"\x07" * memoryview(kept).nbytes
    del kept
    assert memory.kept_bytes == LARGE


def test_the_places_of_a_piece_keep_each_other() -> None:
    memory = PayloadMemory()
    per_piece = PIECE_BYTES // SMALL
    places = [memory.take(SMALL) for _ in range(per_piece + 1)]  # the last one is in the next piece
    last_of_first = places[per_piece - 1]
    del places[: per_piece - 1]
    del places[0]
    assert memory.kept_bytes == 0
    del last_of_first
    assert memory.kept_bytes == PIECE_BYTES


def test_what_is_kept_is_bounded() -> None:
    memory = PayloadMemory(kept_bytes_max=2 * LARGE)
    places = [memory.take(LARGE) for _ in range(5)]
    del places
    assert memory.kept_bytes == 2 * LARGE


def test_pieces_of_another_length_are_not_given_out() -> None:
    memory = PayloadMemory()
    memory.take(LARGE)
    other = memory.take(LARGE + 1)
    assert other.nbytes == LARGE + 1
    assert memory.kept_bytes == LARGE


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells a process's own memory there")
def test_what_is_not_kept_goes_back_to_the_system() -> None:
    def count_mib() -> int:
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")]
        return int(line.split()[1]) >> 10

    memory = PayloadMemory(kept_bytes_max=LARGE)
    before_mib = count_mib()
    for _ in range(3):  # an allocator may learn from the first pieces that are dropped
        places = [memory.take(SMALL) for _ in range(160)]
        for place in places:
            place[:] = b"\x01" * SMALL
        assert count_mib() - before_mib >= 160 * SMALL >> 20
        del places, place
        assert count_mib() - before_mib <= 3 * LARGE >> 20
