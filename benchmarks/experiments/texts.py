"""What the workers of an experiment train on, and what is held out: the library of the running Python, whole or by
packages.

Invariant: all corpora of one choice hold out the same bytes, and none of them trains on one of those.
"""

import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from shoal.node.training.data import Corpus, read_corpus
from shoal.protocol.errors import ConfigError

# Eight packages of 200 kB and more that every installation of Python has.
PACKAGES = ("asyncio", "email", "encodings", "http", "importlib", "multiprocessing", "pydoc_data", "xml")
# Of a package one block of so many is held out: smaller blocks than a whole library has, so that each package has some.
BLOCK_BYTES = 1 << 12
BLOCKS_PER_HELD_OUT = 8

LIBRARY, PACKAGE, MIXED = "library", "package", "mixed"


@cache
def read_library(workers: int) -> tuple[Corpus, ...]:
    """All of the library for every worker: each draws its own windows of it."""
    return (_read_whole(),) * workers


@cache
def read_packages(workers: int) -> tuple[Corpus, ...]:
    """Another package for every worker, all cut to the size of the smallest; held out is a share of each of them.
    Raises ConfigError for more workers than there are packages, or where one of them cannot be read."""
    if workers > len(PACKAGES):
        problem = f"{workers} workers have {len(PACKAGES)} packages of the library"
        raise ConfigError("workers", problem, f"use at most {len(PACKAGES)}")
    texts = [_read_package(name) for name in PACKAGES[:workers]]
    size = min(text.size for text in texts)
    trains, held_outs = zip(*(_split(text[:size]) for text in texts), strict=True)
    held_out = np.concatenate(held_outs)
    return tuple(Corpus(train=train, held_out=held_out) for train in trains)


@cache
def read_mixed(workers: int) -> tuple[Corpus, ...]:
    """The same bytes as `read_packages`, but everybody draws from all of them."""
    packages = read_packages(workers)
    train = np.concatenate([one.train for one in packages])
    return (Corpus(train=train, held_out=packages[0].held_out),) * workers


TEXTS: Mapping[str, Callable[[int], tuple[Corpus, ...]]] = MappingProxyType(
    {LIBRARY: read_library, PACKAGE: read_packages, MIXED: read_mixed}
)


@cache
def _read_whole() -> Corpus:
    return read_corpus(None)


def _read_package(name: str) -> NDArray[np.uint8]:
    root = Path(sysconfig.get_path("stdlib"), name)
    files = [file for file in sorted(root.rglob("*.py")) if not {"test", "tests"} & {*file.relative_to(root).parts}]
    try:
        text = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise ConfigError("text", f"{root} cannot be read: {error.strerror}", "install Python's library") from error
    if len(text) < BLOCKS_PER_HELD_OUT * BLOCK_BYTES:
        fix = "install Python's library with its sources"
        raise ConfigError("text", f"{root} has {len(text)} bytes of Python", fix)
    return np.frombuffer(text, np.uint8)


def _split(text: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What is trained on and what is held out of a package."""
    held_out = np.arange(text.size) // BLOCK_BYTES % BLOCKS_PER_HELD_OUT == BLOCKS_PER_HELD_OUT - 1
    return text[~held_out], text[held_out]
