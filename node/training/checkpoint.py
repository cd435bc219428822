"""The trainer's own memory: parameters, optimizer, data position and random states, so that a restart loses few steps.

A checkpoint is a safetensors file and a small record beside it that holds the file's digest; it exists from the moment
in which the record has its name. Nothing in it is code, and nothing of other peers is in it. Beside them lies the
journal: which batches each life of the trainer has trained on. So a restart knows how many steps it has lost.

Invariants: a checkpoint is used only when its digest is right and it belongs to this work; at most CHECKPOINTS_KEPT are
on the disk; a trainer that is killed at any moment leaves the newest whole checkpoint and the journal up to its last
complete step. After a power cut the one before may be the newest.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.node.training.messages import Work
from shoal.protocol.errors import ProtocolError
from shoal.protocol.wire import U63, Bound, Bytes32, Elided, decode_record_untrusted, encode_record

CHECKPOINTS_KEPT = 2
LIVES_KEPT = 64
NUMPY_KEYS = 624  # words of a Mersenne Twister
RECORD_BYTES_MAX = 1 << 16
CHECKSUM_BYTES = 16  # at the record's end
TENSORS_SUFFIX = ".safetensors"
RECORD_SUFFIX = ".record"
JOURNAL_FILE = "batches"
_TEMPORARY = ".partial"
_NUMBER_WIDTH = 20
_LINE_BYTES = 2 * _NUMBER_WIDTH + 2
_NUMPY_KEYS = "random.numpy"
_TORCH_STATE = "random.torch"
_CUDA_STATE = "random.cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """Steps, tokens and losses since some moment `age_s` ago."""

    steps: U63 = 0
    tokens: U63 = 0
    loss_sum: float = 0.0
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NumpyRandom:
    """What of numpy's global generator is no array."""

    position: U63
    has_gauss: U63
    gauss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where the inner loop stood: `batches_done` batches of its data, in the training for `round`. With `waits` it had
    handed its parameters over. `local` is what they hold beyond the base, `pace` counts towards the next Ready. The
    base was last adopted as the training for `since_round` began; 0: an older version has not written it down."""

    round: U63
    batches_done: U63
    waits: bool
    local: Tally
    pace: Tally
    since_round: Annotated[int, Bound(0, 2**63 - 1), Elided()] = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    work: Bytes32
    tensors: Bytes32
    position: Position
    random: NumpyRandom


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One that can be used."""

    position: Position
    tensors: Mapping[str, Tensor]
    random: NumpyRandom

    def restore_random(self) -> None:
        """Set torch's and numpy's generators as they were, as far as this version of them has such a state."""
        known = self.tensors.get(_TORCH_STATE)
        if known is not None and known.shape == torch.get_rng_state().shape:
            torch.set_rng_state(known)
        keys = self.tensors.get(_NUMPY_KEYS)
        if keys is not None and keys.shape == (NUMPY_KEYS,):
            words = keys.numpy().view(np.uint32)
            np.random.set_state(("MT19937", words, self.random.position, self.random.has_gauss, self.random.gauss))
        known = self.tensors.get(_CUDA_STATE)
        if known is not None and torch.cuda.is_available() and known.shape == torch.cuda.get_rng_state().shape:
            torch.cuda.set_rng_state(known)


class CheckpointStore:
    """The folder of one trainer. Everything blocks; OSError where the disk fails."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._work = identify_work(work)
        self._serial = max((int(path.stem) for path in self._records()), default=0)
        self.journal = Journal(folder / JOURNAL_FILE)
        for path in folder.glob(f"*{_TEMPORARY}"):
            path.unlink()  # cut short by a kill

    def _records(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"*{RECORD_SUFFIX}") if path.stem.isdigit())

    def load(self) -> Checkpoint | None:
        """The newest that is whole and belongs to this work."""
        for path in reversed(self._records()):
            checkpoint = self._read(path)
            if checkpoint is not None:
                return checkpoint
        return None

    @property
    def is_foreign(self) -> bool:
        """Whether there are checkpoints, and none of them belongs to this work."""
        records = [self._read_record(path) for path in self._records()]
        return bool(records) and not any(one is not None and one.work == self._work for one in records)

    def _read_record(self, path: Path) -> CheckpointRecord | None:
        try:
            raw = path.read_bytes()
            if raw[-CHECKSUM_BYTES:] != blake3(raw[:-CHECKSUM_BYTES]).digest(CHECKSUM_BYTES):
                return None
            return decode_record_untrusted(CheckpointRecord, raw[:-CHECKSUM_BYTES], RECORD_BYTES_MAX)
        except (OSError, ProtocolError):
            return None

    def _read(self, path: Path) -> Checkpoint | None:
        record = self._read_record(path)
        if record is None or record.work != self._work:
            return None
        tensors_path = path.with_suffix(TENSORS_SUFFIX)
        try:
            if digest_file(tensors_path) != record.tensors:
                return None
            tensors = load_file(tensors_path)
        except (OSError, SafetensorError):
            return None
        return Checkpoint(position=record.position, tensors=tensors, random=record.random)

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Write one and drop those beyond CHECKPOINTS_KEPT. Costs the bytes of the parameters three times over."""
        self._serial += 1
        path = self._folder / f"{self._serial:012d}{TENSORS_SUFFIX}"
        _, keys, numpy_position, has_gauss, gauss = np.random.get_state(legacy=True)
        random = {_TORCH_STATE: torch.get_rng_state(), _NUMPY_KEYS: torch.from_numpy(np.array(keys).view(np.int32))}
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            random[_CUDA_STATE] = torch.cuda.get_rng_state()
        temporary = path.with_suffix(_TEMPORARY)
        try:
            save_file({name: one.contiguous() for name, one in {**tensors, **random}.items()}, temporary)
        except SafetensorError as error:  # what this library makes of every failed write
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary} cannot be written: {error}") from error
        record = CheckpointRecord(
            work=self._work,
            tensors=digest_file(temporary),
            position=position,
            random=NumpyRandom(position=int(numpy_position), has_gauss=int(has_gauss), gauss=float(gauss)),
        )
        temporary.replace(path)
        raw = encode_record(record)
        temporary.write_bytes(raw + blake3(raw).digest(CHECKSUM_BYTES))
        temporary.replace(path.with_suffix(RECORD_SUFFIX))
        for old in self._records()[:-CHECKPOINTS_KEPT]:
            # The record first: without it the tensors are nothing.
            old.unlink(missing_ok=True)
            old.with_suffix(TENSORS_SUFFIX).unlink(missing_ok=True)


class Journal:
    """Which batches each life has trained on: a line of text per life, the first batch and one past the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._line = 0

    def lives(self) -> list[tuple[int, int]]:
        """(first, end) of every life that is still known, oldest first."""
        try:
            raw = self._path.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for at in range(0, len(raw) - _LINE_BYTES + 1, _LINE_BYTES):
            with suppress(ValueError):
                first, end = raw[at : at + _LINE_BYTES].split()
                found.append((int(first), int(end)))
        return found

    def begin(self, first: int) -> None:
        """A life begins with this batch."""
        lives = self.lives()[-(LIVES_KEPT - 1) :]
        temporary = self._path.with_suffix(_TEMPORARY)
        temporary.write_bytes(b"".join(_line(*life) for life in [*lives, (first, first)]))
        temporary.replace(self._path)
        self._line = len(lives)
        self._descriptor = os.open(self._path, os.O_WRONLY)

    def note(self, end: int) -> None:
        """All batches before `end` are trained. One small write, which a kill does not undo."""
        if self._descriptor is not None:
            offset = self._line * _LINE_BYTES + _NUMBER_WIDTH + 1
            os.pwrite(self._descriptor, f"{end:>{_NUMBER_WIDTH}}".encode(), offset)


def _line(first: int, end: int) -> bytes:
    return f"{first:>{_NUMBER_WIDTH}} {end:>{_NUMBER_WIDTH}}\n".encode()


def identify_work(work: Work) -> bytes:
    """Two works with one digest go on from each other's checkpoints."""
    return blake3(encode_record(replace(work, batches_done=0)), derive_key_context="shoal training work").digest()


def digest_file(path: Path) -> bytes:
    """BLAKE3 of a file's bytes. Raises OSError."""
    hasher = blake3(max_threads=blake3.AUTO)
    hasher.update_mmap(path)
    digest: bytes = hasher.digest()
    return digest
