"""Trained weights in a folder as transformers' `save_pretrained` writes it: read as arrays, and named by a digest.

All peers of a swarm that starts from trained weights need the same ones. The manifest has their digest, the folder is
each machine's own (`trainer.weights`). docs/tasks.md defines the digest: BLAKE3 over the tensors in the order of their
names, so that it does not matter how they are divided among files. Only safetensors are read, because a pickle
(`pytorch_model.bin`) runs the code of whoever wrote it. Needs no torch.

Invariants: what `read` returns is what its digest was computed of, read once; nothing is allocated for a tensor before
its place has been compared with the size of its file.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.protocol.errors import ConfigError

FIELD = "trainer.weights"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DIGEST_CONTEXT = "shoal weights"
HEADER_BYTES_MAX = 100_000_000  # the safetensors library's own limit
INDEX_BYTES_MAX = 1 << 26
FILES_MAX = 4096

_READ_BYTES = 1 << 24
_FIX = "give a folder as transformers' save_pretrained writes it, with model.safetensors"
_SAVE = "where you trust it, load it with transformers and write it anew: save_pretrained writes safetensors"
_LENGTH = struct.Struct("<Q")
# Bytes of an element, by safetensors' word.
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_EXACT_IN_FLOAT32 = ("F32", "F16", "BF16")

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor stands: `size_bytes` from `first` in its file. `dtype` is safetensors' word, as "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    size_bytes: int


class WeightsFolder:
    """The tensors of a folder by name. Opening it reads the headers alone; raises ConfigError naming the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for path in _list_files(folder):
            for name, stored in _read_header(path):
                if name in self.tensors:
                    raise ConfigError(FIELD, f"{path} has {name[:128]!r}, and so has another file", _FIX)
                self.tensors[name] = stored

    def find(self, parameter: str) -> str | None:
        """The name here of a model's parameter: its own, or that in the model without its head, as files that were
        written of such a one have it ("h.0.…" for "transformer.h.0.…")."""
        inner = parameter.partition(".")[2]
        return parameter if parameter in self.tensors else inner if inner in self.tensors else None

    def match(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, str]:
        """The name here of each parameter; raises ConfigError where one is missing or has another shape or type."""
        matched = {}
        for parameter, shape in shapes:
            name = self.find(parameter)
            if name is None:
                fix = "use weights whose files name their tensors as the model of the config does"
                raise ConfigError(FIELD, f"{self.folder} has no tensor {parameter}", fix)
            stored = self.tensors[name]
            if stored.shape != shape:
                problem = f"{stored.path} has {name} as {list(stored.shape)}, and the config says {list(shape)}"
                raise ConfigError(FIELD, problem, "use the config.json of that folder")
            if stored.dtype not in _EXACT_IN_FLOAT32:
                fix = f"write the weights anew as one of: {', '.join(_EXACT_IN_FLOAT32)}"
                raise ConfigError(FIELD, f"{stored.path} has {name} as {stored.dtype}", fix)
            matched[parameter] = name
        return matched

    def load(self, names: Collection[str]) -> tuple[bytes, dict[str, Floats]]:
        """The digest of all tensors, and as float32 those of these that float32 holds exactly; raises ConfigError where
        a file cannot be read."""
        digest, contents = self.read(names)
        return digest, {name: widen(contents.pop(name), self.tensors[name]) for name in list(contents)}

    def read(self, names: Collection[str]) -> tuple[bytes, dict[str, Bytes]]:
        """As `load`, each tensor's bytes as they stand in the file."""
        hasher = blake3(derive_key_context=DIGEST_CONTEXT, max_threads=blake3.AUTO)
        contents: dict[str, Bytes] = {}
        for name in sorted(self.tensors, key=str.encode):
            stored = self.tensors[name]
            hasher.update(_describe(name, stored))
            taken = name in names and stored.dtype in _EXACT_IN_FLOAT32
            content = np.empty(stored.size_bytes if taken else 0, dtype=np.uint8)
            for first, piece in _read_pieces(stored):
                hasher.update(piece)
                if taken:
                    content[first : first + len(piece)] = np.frombuffer(piece, dtype=np.uint8)
            if taken:
                contents[name] = content
        return hasher.digest(), contents


def _describe(name: str, stored: StoredTensor) -> bytes:
    """What stands before a tensor's bytes in what the digest is of."""
    name_bytes, dtype = name.encode(), stored.dtype.encode()
    lengths = (struct.pack(">I", len(one)) for one in (name_bytes, dtype, stored.shape))
    sizes = struct.pack(f">{len(stored.shape)}QQ", *stored.shape, stored.size_bytes)
    return b"".join((next(lengths), name_bytes, next(lengths), dtype, next(lengths), sizes))


def widen(content: Bytes, stored: StoredTensor) -> Floats:
    """The same values as float32, in the tensor's shape."""
    match stored.dtype:
        case "F32":
            values = content.view("<f4").astype(np.float32, copy=False)
        case "F16":
            values = content.view("<f2").astype(np.float32)
        case "BF16":  # the upper half of a float32
            values = (content.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        case _:
            raise AssertionError("`read` takes no other type")
    return values.reshape(stored.shape)


def _read_pieces(stored: StoredTensor) -> Iterator[tuple[int, bytes]]:
    """A tensor's bytes in order, each piece with where it begins."""
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.first)
            done = 0
            while done < stored.size_bytes:
                piece = file.read(min(_READ_BYTES, stored.size_bytes - done))
                if not piece:
                    raise ConfigError(FIELD, f"{stored.path} has become shorter", "copy it anew")
                yield done, piece
                done += len(piece)
    except OSError as error:
        raise ConfigError(FIELD, f"{stored.path} cannot be read: {error.strerror or error}", _FIX) from error


def _list_files(folder: Path) -> list[Path]:
    """The files that transformers would read: the one, or those that the index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return [folder / name for name in _read_index(folder / INDEX_FILE)]
    if not folder.is_dir():
        raise ConfigError(FIELD, f"{folder} is no folder", _FIX)
    pickles = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
    if pickles:
        problem = f"{folder} has {pickles[0]} and no {WEIGHTS_FILE}: a pickle runs the code of whoever wrote it"
        raise ConfigError(FIELD, problem, _SAVE)
    raise ConfigError(FIELD, f"{folder} has no {WEIGHTS_FILE}", _FIX)


def _read_index(path: Path) -> list[str]:
    document = _parse(path, _read_start(path, INDEX_BYTES_MAX))
    named = document.get("weight_map")
    files = sorted(set(named.values())) if isinstance(named, dict) and _are_names(named.values()) else []
    if not 1 <= len(files) <= FILES_MAX:
        raise ConfigError(FIELD, f"{path} names no files of safetensors in its own folder", _FIX)
    return files


def _are_names(values: Collection[Any]) -> bool:
    return all(isinstance(one, str) and one.endswith(".safetensors") and Path(one).name == one for one in values)


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a safetensors file: 8 bytes of length, a header in JSON, the tensors' bytes."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            raw, first = _read_header_bytes(file, size)
    except OSError as error:
        raise ConfigError(FIELD, f"{path} cannot be read: {error.strerror or error}", _FIX) from error
    if raw is None:
        raise ConfigError(FIELD, f"{path} is no file of safetensors", _FIX)
    for name, entry in _parse(path, raw).items():
        if name != "__metadata__":
            stored = _read_entry(path, entry, first, size)
            if stored is None:
                raise ConfigError(FIELD, f"{path} says of {name[:128]!r} what cannot be", "copy or write it anew")
            yield name, stored


def _read_header_bytes(file: BinaryIO, size: int) -> tuple[bytes | None, int]:
    """The header, or None where there is none, and where the tensors begin."""
    length = file.read(_LENGTH.size)
    header_bytes = _LENGTH.unpack(length)[0] if len(length) == _LENGTH.size else size
    first = _LENGTH.size + header_bytes
    return (file.read(header_bytes) if header_bytes <= HEADER_BYTES_MAX and first <= size else None), first


def _read_entry(path: Path, entry: Any, first: int, size: int) -> StoredTensor | None:
    """None where it is none, or does not lie within the file."""
    with suppress(KeyError, TypeError, ValueError):
        low, high = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        whole = all(type(one) is int and one >= 0 for one in (low, high, *shape))
        if whole and low <= high <= size - first and high - low == math.prod(shape) * _SIZES[dtype]:
            return StoredTensor(path=path, dtype=dtype, shape=shape, first=first + low, size_bytes=high - low)
    return None


def _read_start(path: Path, size_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(size_max + 1)
    except OSError as error:
        raise ConfigError(FIELD, f"{path} cannot be read: {error.strerror or error}", _FIX) from error
    if len(raw) > size_max:
        raise ConfigError(FIELD, f"{path} is larger than {size_max} bytes", _FIX)
    return raw


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(FIELD, f"{path} is damaged: {error}"[:400], "copy or write it anew") from error
    if not isinstance(document, dict):
        raise ConfigError(FIELD, f"{path} is damaged: its header is no table", "copy or write it anew")
    return document
