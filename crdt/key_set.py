"""The set of entries that a replica holds, as sorted keys with range sums: what reconciliation asks about.

A key is the entry's time (8 bytes, big endian) and its id (32 bytes), so that an entry sorts after all of its
ancestors and a range of keys is a stretch of history. A bound is a prefix of a key, or KEY_FIRST or KEY_END.

The sum of a range is that of its ids modulo 2^256: it can be kept up to date, and, unlike XOR, is not linear over bits.
Whoever may add 2^16 entries of their own can still find two sets of them with one sum in about 2^32 steps (Wagner,
"A generalized birthday problem", 2002); that hides nobody's entries but their own, and only from this path.

Invariant: each chunk is sorted and holds at most CHUNK_KEYS_MAX keys, all lower than the next chunk's; its sum is
that of its ids.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator

from shoal.crdt.clock import Hlc
from shoal.crdt.kinds import ENTRY_ID_BYTES, EntryId

HLC_BYTES = 8
KEY_BYTES = HLC_BYTES + ENTRY_ID_BYTES
KEY_FIRST = b""
# Times have 63 bits, so that no key begins with this byte.
KEY_END = b"\xff"
CHUNK_KEYS_MAX = 512
_SUM_MODULUS = 2**256


def make_key(hlc: Hlc, entry_id: EntryId) -> bytes:
    """The 40-byte key of an entry."""
    return hlc.to_bytes(HLC_BYTES, "big") + entry_id


def id_of_key(key: bytes) -> EntryId:
    """The id of the entry that has this key."""
    return EntryId(key[HLC_BYTES:])


def find_separator(left: bytes, right: bytes) -> bytes:
    """The shortest bound that lies above the key `left` and not above the key `right`."""
    assert left < right, "keys in ascending order"
    length = next(index for index, (a, b) in enumerate(zip(left, right, strict=True), 1) if a != b)
    return right[:length]


class KeySet:
    """A sorted set of keys that counts and sums any range in time proportional to the number of chunks."""

    def __init__(self) -> None:
        self._chunks: list[list[bytes]] = []
        self._sums: list[int] = []
        self._lasts: list[bytes] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def add(self, key: bytes) -> None:
        """Add a key that is not in the set."""
        assert len(key) == KEY_BYTES, "a whole key"
        if not self._chunks:
            self._chunks.append([])
            self._sums.append(0)
            self._lasts.append(key)
        index = min(bisect_left(self._lasts, key), len(self._chunks) - 1)
        chunk = self._chunks[index]
        insort(chunk, key)
        self._sums[index] = (self._sums[index] + _number_of(key)) % _SUM_MODULUS
        self._lasts[index] = chunk[-1]
        if len(chunk) > CHUNK_KEYS_MAX:
            self._split(index)

    def remove(self, key: bytes) -> None:
        """Take out a key that is in the set."""
        index = bisect_left(self._lasts, key)
        chunk = self._chunks[index]
        del chunk[bisect_left(chunk, key)]
        if not chunk:
            del self._chunks[index], self._sums[index], self._lasts[index]
            return
        self._sums[index] = (self._sums[index] - _number_of(key)) % _SUM_MODULUS
        self._lasts[index] = chunk[-1]

    def rank(self, bound: bytes) -> int:
        """How many keys lie below `bound`."""
        index = bisect_left(self._lasts, bound)
        below = sum(map(len, self._chunks[:index]))
        return below + bisect_left(self._chunks[index], bound) if index < len(self._chunks) else below

    def select(self, rank: int) -> bytes:
        """The key below which `rank` others lie."""
        for chunk in self._chunks:
            if rank < len(chunk):
                return chunk[rank]
            rank -= len(chunk)
        raise AssertionError("rank is below the number of keys")

    def iterate(self, low: bytes, high: bytes) -> Iterator[bytes]:
        """The keys from `low` up to but not including `high`, in ascending order."""
        for index in range(bisect_left(self._lasts, low), len(self._chunks)):
            chunk = self._chunks[index]
            if chunk[0] >= high:
                return
            yield from chunk[bisect_left(chunk, low) : bisect_left(chunk, high)]

    def add_up(self, low: bytes, high: bytes) -> tuple[int, int]:
        """The number of keys from `low` up to but not including `high`, and the sum of their ids modulo 2^256."""
        count = total = 0
        for index in range(bisect_left(self._lasts, low), len(self._chunks)):
            chunk = self._chunks[index]
            if chunk[0] >= high:
                break
            if low <= chunk[0] and chunk[-1] < high:
                count += len(chunk)
                total += self._sums[index]
                continue
            inside = chunk[bisect_left(chunk, low) : bisect_left(chunk, high)]
            count += len(inside)
            total += sum(map(_number_of, inside))
        return count, total % _SUM_MODULUS

    def _split(self, index: int) -> None:
        chunk = self._chunks[index]
        middle = len(chunk) // 2
        self._chunks[index : index + 1] = [chunk[:middle], chunk[middle:]]
        left_sum = sum(map(_number_of, chunk[:middle])) % _SUM_MODULUS
        self._sums[index : index + 1] = [left_sum, (self._sums[index] - left_sum) % _SUM_MODULUS]
        self._lasts[index : index + 1] = [chunk[middle - 1], chunk[-1]]


def _number_of(key: bytes) -> int:
    return int.from_bytes(key[HLC_BYTES:], "big")
