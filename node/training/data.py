"""The text a peer trains on, as bytes: where it comes from, what is held out, which windows make a batch.

Of a file of JSON lines (`.jsonl`) the field "text" of each line is read, of any other file all bytes.

Invariants: the same files give the same split on every machine; no byte that is held out is ever trained on; a batch is
a function of (swarm seed, peer id, batch index), so that peers draw different data and the index is all there is to
store; what is trained on is in memory, so that files may change or go while it is.
"""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.errors import ConfigError

CORPUS_BYTES_MAX = 1 << 30
CORPUS_BYTES_MIN = 1 << 16
BLOCK_BYTES = 1 << 14
HELD_OUT_SHARE = 0.02
HELD_OUT_BYTES_MIN = 1 << 12
EVALUATION_WINDOWS = 64
JSON_LINES = ".jsonl"
JSON_LINE_BYTES_MAX = 1 << 24  # of what is longer, the pieces are lines without a text

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
    lines = _JsonLines()
    blocks = list(_read_blocks(path, bytes_max, lines))
    total = sum(len(block) for _, block in blocks)
    if total < CORPUS_BYTES_MIN:
        raise ConfigError("trainer.text", f"{path} has {total} bytes of text", f"give at least {CORPUS_BYTES_MIN}")
    order = sorted(range(len(blocks)), key=lambda index: blocks[index][0])
    sums = accumulate(len(blocks[index][1]) for index in order)
    wanted = max(HELD_OUT_BYTES_MIN, int(total * HELD_OUT_SHARE))
    count = 1 + next(position for position, reached in enumerate(sums) if reached >= wanted)
    held_out = frozenset(order[:count])
    return Corpus(
        train=_join(block for index, (_, block) in enumerate(blocks) if index not in held_out),
        held_out=_join(block for index, (_, block) in enumerate(blocks) if index in held_out),
        notice=lines.notice,
    )


class Draws:
    """Which examples make a batch: a function of (swarm seed, peer id, batch index)."""

    def __init__(self, seed: int, peer: bytes) -> None:
        self._key = int.from_bytes(
            blake3(seed.to_bytes(8, "big") + peer, derive_key_context="shoal training batches").digest(16), "big"
        )

    def draw(self, index: int, count: int, below: int) -> NDArray[np.int64]:
        """`count` numbers from 0 to `below` - 1 for batch `index`, int64 (count,), the same on every machine."""
        # Philox draws for one batch advance the counter's low word only; the index stands above it.
        draws = np.random.Philox(key=self._key, counter=index << 64).random_raw(count)
        return (draws % np.uint64(below)).astype(np.int64)


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


class _JsonLines:
    """Reads files of JSON lines, and counts what of them has no text."""

    def __init__(self) -> None:
        self._lines = 0
        self._bad = 0

    @property
    def notice(self) -> str:
        if not self._bad:
            return ""
        return f'trainer.text: {self._bad} of {self._lines} lines of JSON have no "text" and are left out'

    def read(self, file: Path, bytes_max: int) -> memoryview:
        """The texts in UTF-8, with a line break after each, cut off at `bytes_max`. Raises OSError, and ConfigError
        where more than half of the lines have none: that is another kind of file."""
        texts, lines, bad = bytearray(), 0, 0
        with file.open("rb") as source:
            while len(texts) < bytes_max and (line := source.readline(JSON_LINE_BYTES_MAX)):
                if line.isspace():
                    continue
                lines += 1
                text = _find_text(line)
                if text is None:
                    bad += 1
                else:
                    texts += text.encode(errors="replace") + b"\n"
        if 2 * bad > lines:
            problem = f"{file} has no text in {bad} of {lines} lines of JSON"
            raise ConfigError("trainer.text", problem, 'write one object a line, with a string in "text"')
        self._lines += lines
        self._bad += bad
        return memoryview(texts)[:bytes_max]


def _find_text(line: bytes) -> str | None:
    """The string in the field "text" of a JSON object; None where the line is no such thing."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = found.get("text") if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


def _read_blocks(path: Path | None, bytes_max: int, lines: _JsonLines) -> Iterator[tuple[bytes, memoryview]]:
    """(hash of the file's name and the block's number, text) in corpus order."""
    left = bytes_max
    library = path is None
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    try:
        for file in _list_files(root, ".py" if library else "", _NOT_LIBRARY if library else frozenset()):
            if left <= 0:
                return
            text = lines.read(file, left) if file.suffix == JSON_LINES else _read_start(file, left)
            left -= len(text)
            name = file.relative_to(root).as_posix().encode() if file != root else file.name.encode()
            for number, first in enumerate(range(0, len(text), BLOCK_BYTES)):
                digest = blake3(name + b"\0" + number.to_bytes(8, "big")).digest()
                yield digest, text[first : first + BLOCK_BYTES]
    except OSError as error:
        raise ConfigError("trainer.text", f"{root} cannot be read: {error.strerror}", "name a readable path") from error


def _read_start(file: Path, bytes_max: int) -> memoryview:
    with file.open("rb") as source:
        return memoryview(source.read(bytes_max))


def _list_files(root: Path, suffix: str, skipped: frozenset[str]) -> Iterator[Path]:
    """The file itself, or the files under a folder that are not hidden, sorted folder by folder."""
    if not root.is_dir():
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in sorted(names):
            file = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and file.is_file():
                yield file


def _join(blocks: Iterator[memoryview]) -> NDArray[np.uint8]:
    return np.concatenate([np.frombuffer(block, dtype=np.uint8) for block in blocks])
