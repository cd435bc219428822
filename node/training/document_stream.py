"""A peer's own way through a data set: which documents it trains on, in which order, and where it stands.

A pass goes through all files in an order of the peer's own. Where there are fewer than FILES_MIN files, so that others
would read the same ones at the same time, the documents are parted by their hash into CLASSES, and a pass takes one
class: peers begin with classes of their own, and CLASSES passes are one epoch. What is held out is chosen of the first
PREFIX_BYTES, the same at every peer, and never trained on wherever the same document comes again.

Invariants: the next document is a function of (files, seed, peer, place), and a place is a few hundred bytes; a
document that is held out never leaves `DocumentStream`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from blake3 import blake3

from shoal.node.training.data import CORPUS_BYTES_MIN, HELD_OUT_SHARE, choose_held_out
from shoal.node.training.datasets_library import FIELD, DatasetFiles, DocumentReader
from shoal.protocol.errors import ConfigError

FILES_MIN = 16
CLASSES = 8
PREFIX_BYTES = 1 << 22
HELD_OUT_BYTES_MAX = 1 << 20
HASH_BYTES = 16
EPOCHS_EMPTY_MAX = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """In which pass, at which file of the pass's order, and where in it. `start` is the batch with which this way
    through the data began: 0, or later where it was not known where another one had ended."""

    start: int = 0
    number: int = 0  # of the pass
    file: int = 0
    state: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Documents that are not trained on: the texts, and the hashes by which they are known again."""

    texts: tuple[str, ...]
    hashes: frozenset[bytes]


def hash_document(text: str) -> bytes:
    """A document is another one where this is."""
    return blake3(text.encode(errors="replace")).digest(HASH_BYTES)


def choose_documents(files: DatasetFiles, wanted_min: int) -> HeldOut:
    """Of the first documents, in the order of the files, those with the lowest hashes, until they make up the share
    and `wanted_min` bytes. Raises ConfigError where there is too little text."""
    found: dict[bytes, str] = {}
    size = 0
    for text in _read_all(files):
        found.setdefault(hash_document(text), text)
        size += len(text.encode(errors="replace"))
        if size >= PREFIX_BYTES:
            break
    files.judge_rows()
    if size < CORPUS_BYTES_MIN:
        raise ConfigError(FIELD, f"has {size} bytes of text", f"give at least {CORPUS_BYTES_MIN}")
    sizes = {key: len(text.encode(errors="replace")) for key, text in found.items()}
    wanted = max(wanted_min, int(size * HELD_OUT_SHARE))
    keys = list(found)
    chosen = choose_held_out([(key, sizes[key]) for key in keys], wanted)
    if len(chosen) == len(found):
        fix = "give more documents, or cut them into smaller ones"
        raise ConfigError(FIELD, f"has {len(found)} documents, and to hold some out takes all of them", fix)
    kept = [keys[index] for index in sorted(chosen)]
    return HeldOut(texts=tuple(found[key] for key in kept), hashes=frozenset(kept))


def _read_all(files: DatasetFiles) -> Iterator[str]:
    with files.told():
        for number in range(files.count):
            yield from files.read(number, None)


class DocumentStream:
    """The documents from a place on, without end."""

    def __init__(self, files: DatasetFiles, seed: int, peer: bytes, held_out: frozenset[bytes], place: Place) -> None:
        self._files = files
        self._key = blake3(
            seed.to_bytes(8, "big") + peer + place.start.to_bytes(8, "big"),
            derive_key_context="shoal order of documents",
        ).digest(24)
        self._held_out = held_out
        self._classes = CLASSES if files.count < FILES_MIN else 1
        self._place = place
        self._reader: DocumentReader | None = None
        self._documents = self._read()

    @property
    def place(self) -> Place:
        """Where the next document is looked for."""
        return self._place if self._reader is None else replace(self._place, state=self._reader.state())

    def __next__(self) -> str:
        """Raises ValueError where a whole epoch has no document to train on."""
        return next(self._documents)

    def _read(self) -> Iterator[str]:
        empty = 0
        while empty <= EPOCHS_EMPTY_MAX * self._classes:
            empty += 1
            order = self._order(self._place.number)
            wanted = (int.from_bytes(self._key[16:]) + self._place.number) % self._classes
            while self._place.file < len(order):
                self._reader = self._files.read(order[self._place.file], self._place.state)
                for text in self._reader:
                    if self._is_wanted(hash_document(text), wanted):
                        empty = 0
                        yield text
                self._reader = None
                self._place = replace(self._place, file=self._place.file + 1, state=None)
            self._place = replace(self._place, number=self._place.number + 1, file=0, state=None)
        raise ValueError(f"{FIELD} has no document to train on beside those that are held out")

    def _is_wanted(self, key: bytes, wanted: int) -> bool:
        return int.from_bytes(key[:8]) % self._classes == wanted and key not in self._held_out

    def _order(self, number: int) -> list[int]:
        """The files in the order of a pass."""
        key = int.from_bytes(self._key[:16])
        draws = np.random.Philox(key=key, counter=number << 64).random_raw(self._files.count)
        return [int(index) for index in np.argsort(draws, kind="stable")]
