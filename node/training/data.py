"""The text a peer trains on, as bytes: where it comes from, what is held out, which windows make a batch.

documents.py says what is read of a file.

Invariants: the same files give the same split on every machine; no byte that is held out is ever trained on; a batch is
a function of (swarm seed, peer id, batch index), so that peers draw different data and the index is all there is to
store, and of the peer's share, which the daemon tells, where data are divided; what is trained on is in memory, so that
files may change or go while it is.
"""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.node.training.documents import FIELD, TextFiles, list_files, name_file
from shoal.node.training.shards import SHARD_SUFFIX, is_shard
from shoal.protocol.errors import ConfigError

CORPUS_BYTES_MAX = 1 << 30
CORPUS_BYTES_MIN = 1 << 16
BLOCK_BYTES = 1 << 14
HELD_OUT_SHARE = 0.02
SHARE_BLOCKS = 256  # that a peer's share of divided data is made of: so many, spread over all of it
HELD_OUT_BYTES_MIN = 1 << 12
EVALUATION_WINDOWS = 64

# Folders of the standard library that are tests, or other people's packages.
_NOT_LIBRARY = frozenset({"__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Text to train on and text held out, each uint8[n]; `notice` says what of the files could not be used."""

    train: NDArray[np.uint8]
    held_out: NDArray[np.uint8]
    notice: str = ""


def read_corpus(path: Path | None, bytes_max: int = CORPUS_BYTES_MAX) -> Corpus:
    """The corpus in a file or a folder (walked in sorted order, hidden files left out), or, without a path, in the
    standard library of the running Python without its tests. It has at most `bytes_max` bytes; raises ConfigError.

    Every file is cut into blocks. Blocks are held out in the order of the hash of (file name, block number) until they
    make up the share, so that small files are held out whole and a large one in pieces."""
    files = TextFiles()
    blocks = list(_read_blocks(path, bytes_max, files))
    total = sum(len(block) for _, block in blocks)
    if total < CORPUS_BYTES_MIN:
        raise ConfigError(FIELD, f"{path} has {total} bytes of text", f"give at least {CORPUS_BYTES_MIN}")
    wanted = max(HELD_OUT_BYTES_MIN, int(total * HELD_OUT_SHARE))
    held_out = choose_held_out([(key, len(block)) for key, block in blocks], wanted)
    return Corpus(
        train=_join(block for index, (_, block) in enumerate(blocks) if index not in held_out),
        held_out=_join(block for index, (_, block) in enumerate(blocks) if index in held_out),
        notice=files.notice,
    )


def choose_held_out(blocks: Sequence[tuple[bytes, int]], wanted: int) -> frozenset[int]:
    """Which of the blocks (hash, size) are held out: in the order of the hash, until they make up `wanted`."""
    order = sorted(range(len(blocks)), key=lambda index: blocks[index][0])
    sums = accumulate(blocks[index][1] for index in order)
    last = next((place for place, reached in enumerate(sums) if reached >= wanted), len(order) - 1)
    return frozenset(order[: last + 1])


class Draws:
    """Which examples make a batch: a function of (swarm seed, peer id, batch index), and of the peer's share where data
    are divided."""

    def __init__(self, seed: int, peer: bytes) -> None:
        self._key = int.from_bytes(
            blake3(seed.to_bytes(8, "big") + peer, derive_key_context="shoal training batches").digest(16), "big"
        )
        self._place, self._places = 0, 1

    def take_share(self, place: int, places: int) -> None:
        """Draw from every so manieth block alone, beginning with the one at `place`: shares with other places have
        nothing in common with this one, and each is spread over all of the data."""
        assert 0 <= place < places, "a place among the places"
        self._place, self._places = place, places

    def draw(self, index: int, count: int, below: int) -> NDArray[np.int64]:
        """`count` numbers from 0 to `below` - 1 for batch `index`, int64 (count,), the same on every machine. Of data
        that have fewer examples than blocks nobody has a share."""
        # Philox draws for one batch advance the counter's low word only; the index stands above it.
        draws = np.random.Philox(key=self._key, counter=index << 64).random_raw(count)
        block = below // (self._places * SHARE_BLOCKS)
        if self._places == 1 or block == 0:
            return (draws % np.uint64(below)).astype(np.int64)
        number, offset = np.divmod((draws % np.uint64(SHARE_BLOCKS * block)).astype(np.int64), block)
        return (number * self._places + self._place) * block + offset


class ByteWindows:
    """Batches of windows of `context` + 1 bytes: the last `context` of them are to be predicted."""

    def __init__(self, corpus: Corpus, *, context: int, batch_size: int, seed: int, peer: bytes) -> None:
        assert min(corpus.train.size, corpus.held_out.size) > context, "the corpus' minimum exceeds any context"
        self._corpus = corpus
        self._context = context
        self._batch_size = batch_size
        self._draws = Draws(seed, peer)

    @property
    def train_bytes(self) -> int:
        return self._corpus.train.size

    @property
    def held_out_bytes(self) -> int:
        return self._corpus.held_out.size

    @property
    def tokens_per_batch(self) -> int:
        return self._batch_size * self._context

    @property
    def held_out_tokens(self) -> int:
        return EVALUATION_WINDOWS * self._context

    @property
    def notice(self) -> str:
        return self._corpus.notice

    def take_share(self, place: int, places: int) -> None:
        self._draws.take_share(place, places)

    def batch(self, index: int) -> NDArray[np.int64]:
        """Batch `index` of this peer, int64 (batch_size, context + 1)."""
        starts = self._draws.draw(index, self._batch_size, self._corpus.train.size - self._context)
        return self._windows(self._corpus.train, starts)

    def held_out(self) -> NDArray[np.int64]:
        """The windows to evaluate on, evenly spread over the held-out text: int64 (EVALUATION_WINDOWS, context + 1)."""
        last = self._corpus.held_out.size - self._context - 1
        starts = np.arange(EVALUATION_WINDOWS, dtype=np.int64) * last // max(1, EVALUATION_WINDOWS - 1)
        return self._windows(self._corpus.held_out, starts)

    def _windows(self, text: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:
        windows: NDArray[np.int64] = text[starts[:, None] + np.arange(self._context + 1)].astype(np.int64)
        return windows


def list_text_files(path: Path | None) -> Iterator[tuple[Path, bytes]]:
    """(file, its name on every machine) of a corpus, in its order. Raises OSError."""
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    suffix, skipped = (".py", _NOT_LIBRARY) if path is None else ("", frozenset[str]())
    for file in list_files(root, suffix, skipped):
        yield file, name_file(file, root)


def _read_blocks(path: Path | None, bytes_max: int, files: TextFiles) -> Iterator[tuple[bytes, memoryview]]:
    """(hash of the file's name and the block's number, text) in corpus order."""
    left = bytes_max
    try:
        for file, name in list_text_files(path):
            if left <= 0:
                return
            if file.suffix == SHARD_SUFFIX and is_shard(file):
                fix = "give the text itself, or a task with that tokenizer"
                raise ConfigError(FIELD, f"{file} holds tokens, and this task reads bytes", fix)
            text = files.read(file, left)
            left -= len(text)
            for number, first in enumerate(range(0, len(text), BLOCK_BYTES)):
                yield hash_block(name, number), text[first : first + BLOCK_BYTES]
    except OSError as error:
        problem = f"{path or 'the library of Python'} cannot be read: {error.strerror or error}"
        raise ConfigError(FIELD, problem, "name a readable path") from error


def hash_block(name: bytes, number: int) -> bytes:
    """Blocks are held out in the order of this."""
    return blake3(name + b"\0" + number.to_bytes(8, "big")).digest()


def _join(blocks: Iterator[memoryview]) -> NDArray[np.uint8]:
    return np.concatenate([np.frombuffer(block, dtype=np.uint8) for block in blocks])
