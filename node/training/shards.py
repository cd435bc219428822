"""Shards: files of tokens that were made before the training, read where they lie on the disk.

A shard is a header of 64 bytes and the ids, little-endian, each of 1, 2 or 4 bytes. The header, also little-endian:

    8 bytes   SHOALTOK
    u16       version, 1
    u16       bytes of a token: 1, 2 or 4
    u32       ids of the tokenizer: all tokens are smaller
    u64       tokens in the file
    32 bytes  BLAKE3 of the tokenizer's file; zeros where a token is a byte
    8 bytes   zeros

Needs no torch. Invariant: a file that has its name is whole: it is written beside it and renamed at the end.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shoal.node.training.documents import FIELD, TextFiles, list_files
from shoal.node.training.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from shoal.protocol.errors import ConfigError

SHARD_SUFFIX = ".bin"
SHARD_TOKENS = 1 << 27  # 256 MiB at two bytes each
SHARD_TOKENS_MAX = 1 << 36
PIECES_AT_A_TIME = 64
MAKE_SHARDS = "make it with `shoal tokenize`"

_MAGIC = b"SHOALTOK"
_VERSION = 1
_HEADER = struct.Struct("<8sHHIQ32s8x")
_TYPES: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
_TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open one: `tokens` is mapped, read-only. `size` is the number of ids of the tokenizer with that digest."""

    path: Path
    size: int
    digest: bytes
    tokens: NDArray[Any]


def is_shard(path: Path) -> bool:
    """Whether the file begins as one. Raises OSError."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_shard(path: Path) -> Shard:
    """Raises OSError, and ConfigError naming the file where it is none, or not whole."""
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
        size_bytes = os.fstat(file.fileno()).st_size
    if len(raw) < _HEADER.size or raw[: len(_MAGIC)] != _MAGIC:
        raise ConfigError(FIELD, f"{path} is no shard of tokens", f"{MAKE_SHARDS}, or give text by another name")
    _, version, token_bytes, size, count, digest = _HEADER.unpack(raw)
    if version != _VERSION or token_bytes not in _TYPES:
        problem = f"{path} is a shard of version {version} with tokens of {token_bytes} bytes"
        raise ConfigError(FIELD, problem, f"{MAKE_SHARDS} of this version of shoal")
    wanted = _HEADER.size + count * token_bytes
    if size_bytes != wanted:
        raise ConfigError(FIELD, f"{path} has {size_bytes} bytes, its header says {wanted}", "copy or make it again")
    if not count:
        raise ConfigError(FIELD, f"{path} has no token", "remove it")
    tokens = np.memmap(path, dtype=_TYPES[token_bytes], mode="r", offset=_HEADER.size, shape=(count,))
    return Shard(path=path, size=size, digest=digest, tokens=tokens)


def choose_type(size: int) -> Any:
    """The smallest of the types that hold ids below `size`."""
    return next(kind for width, kind in _TYPES.items() if size <= 1 << 8 * width)


class ShardWriter:
    """Writes one shard. Left by an error, or with no token, it leaves no file."""

    def __init__(self, path: Path, size: int, digest: bytes) -> None:
        self._path = path
        self._size = size
        self._digest = digest
        self._temporary = path.with_name(path.name + _TEMPORARY)
        self._type = choose_type(size)
        self.count = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb")
        self._file.write(bytes(_HEADER.size))
        return self

    def write(self, tokens: Sequence[int] | NDArray[Any]) -> None:
        """Append; raises OSError."""
        ids = np.asarray(tokens)
        assert not ids.size or 0 <= int(ids.min()) <= int(ids.max()) < self._size, "the tokenizer's own ids"
        self._file.write(ids.astype(self._type).tobytes())
        self.count += ids.size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                width = self._type.itemsize
                self._file.write(_HEADER.pack(_MAGIC, _VERSION, width, self._size, self.count, self._digest))
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None and self.count:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What `write_shards` did; `notice` says what of the texts could not be used."""

    paths: tuple[Path, ...]
    tokens: int
    notice: str


def tokenize_files(
    texts: Sequence[Path], out: Path, path: Path | None, end: str | None, tokens_max: int, told: Callable[[str], None]
) -> tuple[Written, bytes]:
    """`shoal tokenize`: the shards, and the digest of the tokenizer in the file at `path`. Raises ConfigError."""
    tokenizer = ByteTokenizer() if path is None else FileTokenizer(path)
    end_id = None
    if end is not None:
        end_id = tokenizer.find(end) if isinstance(tokenizer, FileTokenizer) else None
        if end_id is None:
            raise ConfigError("--end", f"the tokenizer has no token {end!r}", "leave it out, or name one that it has")
    if not 1 <= tokens_max <= SHARD_TOKENS_MAX:
        raise ConfigError("--shard-tokens", f"is {tokens_max}", f"use 1 to {SHARD_TOKENS_MAX}")
    try:
        written = write_shards(texts, out, tokenizer, end_id, tokens_max, told)
    except OSError as error:
        problem = f"{error.filename or out}: {error.strerror or error}"
        raise ConfigError("TEXT or --out", problem, "name what can be read and a folder that can be written") from error
    return written, tokenizer.digest


def write_shards(
    texts: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    end: int | None = None,
    tokens_max: int = SHARD_TOKENS,
    told: Callable[[str], None] = lambda text: None,
) -> Written:
    """Tokenize files and folders of text into a folder of shards, `00000.bin` and on, of about `tokens_max` tokens
    each; after every document stands the token `end`. `told` hears how far it is. Raises OSError, ConfigError; then the
    shards that are whole stay."""
    if any(out.resolve().is_relative_to(text.resolve()) for text in texts):
        raise ConfigError("--out", f"{out} is inside of the text", "give a folder elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    if taken := next(iter(sorted(out.glob(f"*{SHARD_SUFFIX}"))), None):
        raise ConfigError("--out", f"{out} has {taken.name} already", "give a new folder")
    files = TextFiles()
    pieces = _encode(texts, files, tokenizer, end)
    paths: list[Path] = []
    tokens = 0
    for first in pieces:
        path = out / f"{len(paths):05}{SHARD_SUFFIX}"
        with ShardWriter(path, tokenizer.size, tokenizer.digest) as writer:
            for piece in chain((first,), pieces):
                writer.write(piece)
                if writer.count >= tokens_max:
                    break
        tokens += writer.count
        told(f"{tokens:,} tokens")
        paths += [path] if writer.count else []
    if not tokens:
        raise ConfigError("TEXT", "there is no text in it", "give a file, or a folder of them")
    return Written(paths=tuple(paths), tokens=tokens, notice=files.notice)


def _encode(texts: Sequence[Path], files: TextFiles, tokenizer: Tokenizer, end: int | None) -> Iterator[list[int]]:
    pieces = (piece for text in texts for file in _list_texts(text) for piece in files.pieces(file))
    while group := list(islice(pieces, PIECES_AT_A_TIME)):
        for ids, (_, is_end) in zip(tokenizer.encode([text for text, _ in group]), group, strict=True):
            yield [*ids, end] if is_end and end is not None else list(ids)


def _list_texts(text: Path) -> Iterator[Path]:
    for file in list_files(text):
        if is_shard(file):
            raise ConfigError("TEXT", f"{file} holds tokens", "give the text itself")
        yield file
