"""The inner loops of the sparse codecs: which values of a chunk are its largest, and where they stand.

Invariants: as in protocol/kernels.py. Magnitudes are compared as the unsigned integers of the same bits, so which
values are chosen is a matter of whole numbers alone.
"""

import numpy as np

from shoal.protocol.kernels import Float32s, Scalar, Uint8s, Uint16s, Uint32s, bits_of, compiled

_MAGNITUDE = np.uint32(0x7FFFFFFF)


@compiled
def _find_floor(row: Float32s, peaks: Uint32s) -> Scalar:
    """A magnitude that at least as many values reach as there are `peaks`: the row is dealt out to so many hands, and
    every hand has one that does."""
    peaks[:] = 0
    for start in range(0, row.size, peaks.size):
        dealt = row[start : start + peaks.size]
        for index in range(dealt.size):
            peaks[index] = max(peaks[index], bits_of(dealt[index]) & _MAGNITUDE)
    floor = _MAGNITUDE
    for index in range(peaks.size):
        floor = min(floor, peaks[index])
    return floor


@compiled
def _list_from(row: Float32s, floor: Scalar, sizes: Uint32s, places: Uint16s) -> int:
    """Write the magnitudes from `floor` on and their places, in the row's order; how many there are."""
    count = 0
    for index in range(row.size):
        size = bits_of(row[index]) & _MAGNITUDE
        # Written in any case and kept if it counts: no branch that a processor could mispredict.
        sizes[count], places[count] = size, index
        count += size >= floor
    return count


@compiled
def _count_from(sizes: Uint32s, low: Scalar) -> int:
    count = np.int32(0)
    for index in range(sizes.size):
        count = np.int32(count + np.int32(sizes[index] >= low))
    return int(count)


@compiled
def _find_threshold(sizes: Uint32s, floor: Scalar, count: int) -> Scalar:
    """A number that `count` of these reach and, unless it is one of them, no more: by halving."""
    low, high = np.int64(floor), np.int64(_MAGNITUDE)
    while low < high:
        middle = low + (high - low + 1) // 2
        found = _count_from(sizes, np.uint32(middle))
        if found >= count:
            low = middle
        else:
            high = middle - 1
        if found == count:
            break
    return np.uint32(low)


@compiled
def _take(
    row: Float32s, sizes: Uint32s, places: Uint16s, threshold: Scalar, chosen: Float32s, chosen_places: Uint16s
) -> None:
    """All above the threshold, and of those at it the first ones, until every place is taken. `chosen_places` may be
    the front of `places`."""
    equals, taken = chosen.size - _count_from(sizes, threshold + np.uint32(1)), 0
    for index in range(sizes.size):
        is_equal = sizes[index] == threshold and equals > 0
        if sizes[index] > threshold or is_equal:
            equals -= is_equal
            chosen[taken], chosen_places[taken] = row[places[index]], places[index]
            taken += 1


@compiled
def _pack_places(places: Uint16s, packed: Uint8s) -> None:
    """Two numbers of 12 bits in three bytes, the first one lowest; a last one alone takes two."""
    for pair in range(places.size // 2):
        first, second = places[2 * pair], places[2 * pair + 1]
        packed[3 * pair] = first & 0xFF
        packed[3 * pair + 1] = (first >> 8) | ((second & 0x0F) << 4)
        packed[3 * pair + 2] = second >> 4
    if places.size % 2:
        packed[-2], packed[-1] = places[-1] & 0xFF, places[-1] >> 8


@compiled
def _place_at(packed: Uint8s, number: int) -> Scalar:
    """The number that stands there, with what is behind the last one if it stands alone."""
    at = number // 2 * 3
    if number % 2:
        return (np.int64(packed[at + 1]) >> 4) | (np.int64(packed[at + 2]) << 4)
    second = np.int64(packed[at + 1])
    return np.int64(packed[at]) | ((second if at + 2 == packed.size else second & 0x0F) << 8)


@compiled
def choose(
    values: Float32s, chunk: int, share: int, sizes: Uint32s, places: Uint16s, chosen: Float32s, packed: Uint8s
) -> None:
    """Of every chunk the values of the largest magnitude, one of each `share`, in the order in which they stand, and
    their packed places. Of equal ones the first are chosen. `sizes` and `places` are for `chunk` numbers each."""
    count, width = chunk // share, (3 * (chunk // share) + 1) // 2
    for number in range((values.size + chunk - 1) // chunk):
        row = values[number * chunk : number * chunk + chunk]
        own = chosen[number * count : number * count + count]
        floor = _find_floor(row, sizes[: own.size])
        candidates = _list_from(row, floor, sizes, places)
        threshold = _find_threshold(sizes[:candidates], floor, own.size)
        # What is chosen goes to the front of `places`, where it overwrites only what has had its turn.
        _take(row, sizes[:candidates], places[:candidates], threshold, own, places[: own.size])
        _pack_places(places[: own.size], packed[number * width : number * width + width])


@compiled
def scatter(chosen: Float32s, packed: Uint8s, chunk: int, share: int, out: Float32s) -> None:
    """The chosen values at their places, 0 everywhere else."""
    count, width = chunk // share, (3 * (chunk // share) + 1) // 2
    out[:] = 0
    for number in range((out.size + chunk - 1) // chunk):
        row, own = out[number * chunk : number * chunk + chunk], chosen[number * count : number * count + count]
        numbers = packed[number * width : number * width + width]
        for index in range(own.size):
            place = _place_at(numbers, index)
            if place < row.size:
                row[place] = own[index]


@compiled
def has_other_places(packed: Uint8s, chunk: int, share: int, elements: int) -> bool:
    """Whether a chunk's places do not ascend, or one is behind its end, or behind the last one something is not 0."""
    count, width = chunk // share, (3 * (chunk // share) + 1) // 2
    for number in range((elements + chunk - 1) // chunk):
        size = min(chunk, elements - number * chunk)
        numbers = packed[number * width : number * width + width]
        before = -1
        for index in range(min(count, (size + share - 1) // share)):
            place = _place_at(numbers, index)
            if place <= before or place >= size:
                return True
            before = place
    return False
