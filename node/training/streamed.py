"""Batches out of a stream of documents: a bounded buffer of windows, filled, shuffled, used up, and filled again.

Interface of the inner loop: batch `index`. A chunk of the stream is read into the buffer, cut into windows, and the
windows are shuffled by (seed, peer, the chunk's first batch), so a batch follows from its index and the chunk's place.
The places of the last CHUNKS_KEPT chunks are kept in a file beside the checkpoints: a restart reads its chunk again and
goes on with the batch after the last one, or goes back as far as its checkpoint does.

Invariants: memory is bounded by CHUNK_TOKENS, CHUNK_BATCHES_MIN and one document; a place is on the disk before a batch
of its chunk is given; the windows of a chunk share no predicted token.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.node.training.data import EVALUATION_WINDOWS
from shoal.node.training.datasets_library import FIELD, DatasetFiles
from shoal.node.training.document_stream import HELD_OUT_BYTES_MAX, DocumentStream, Place, choose_documents
from shoal.node.training.documents import cut
from shoal.node.training.messages import DatasetChoice, Work
from shoal.node.training.shards import PIECES_AT_A_TIME
from shoal.node.training.tokenizer import Tokenizer
from shoal.protocol.errors import ConfigError
from shoal.protocol.wire import encode_record

CHUNK_TOKENS = 1 << 20
CHUNK_BATCHES_MIN = 4
CHUNKS_KEPT = 64
HELD_OUT_BYTES_A_TOKEN = 8  # so many bytes make a token of any tokenizer, with room to spare
POSITION_FILE = "stream.json"
POSITION_BYTES_MAX = 1 << 20
_POSITION_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """`windows` are int32 (n, context + 1) in the order in which they are used; the first batch of them is `first`."""

    first: int
    windows: NDArray[np.int32]
    batches: int

    def holds(self, index: int) -> bool:
        return self.first <= index < self.first + self.batches


class StreamPosition:
    """Where the last chunks began, (first batch, place) in ascending order; on the disk where there is a folder."""

    def __init__(self, folder: Path | None, identity: bytes) -> None:
        self._path = None if folder is None else folder / POSITION_FILE
        self._identity = identity.hex()
        self._chunks = self._load()

    @property
    def is_empty(self) -> bool:
        return not self._chunks

    def find(self, index: int) -> tuple[int, Place] | None:
        """The last chunk that began with this batch or before."""
        found = bisect_right([first for first, _ in self._chunks], index)
        return self._chunks[found - 1] if found else None

    def note(self, first: int, place: Place) -> None:
        """A chunk begins here; what was known of later ones is void. Raises OSError."""
        kept = [chunk for chunk in self._chunks if chunk[0] < first]
        if self.find(first) != (first, place):
            self._chunks = [*kept, (first, place)][-CHUNKS_KEPT:]
            self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        rows = [[first, one.start, one.number, one.file, one.state] for first, one in self._chunks]
        text = json.dumps({"version": _POSITION_VERSION, "of": self._identity, "chunks": rows})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".partial")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)

    def _load(self) -> list[tuple[int, Place]]:
        """Of another data set, or not readable, is as good as none."""
        if self._path is None:
            return []
        try:
            with self._path.open("rb") as file:
                tree = json.loads(file.read(POSITION_BYTES_MAX))
            if (tree["version"], tree["of"]) != (_POSITION_VERSION, self._identity):
                return []
            rows = [
                (int(first), Place(start=int(start), number=int(number), file=int(file), state=state))
                for first, start, number, file, state in tree["chunks"]
                if state is None or isinstance(state, dict)
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return sorted(rows, key=lambda row: row[0])[-CHUNKS_KEPT:]


class StreamWindows:
    """Batches of windows of `context` + 1 tokens: the last `context` of them are to be predicted."""

    train_bytes = 0  # nobody knows how much there is

    def __init__(
        self,
        files: DatasetFiles,
        tokenizer: Tokenizer,
        position: StreamPosition,
        *,
        context: int,
        work: Work,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """Raises ConfigError."""
        self._files, self._tokenizer, self._position = files, tokenizer, position
        self._context, self._batch_size = context, work.training.batch_size
        self._seed, self._peer = work.seed, bytes(work.peer)
        self.tokens_per_batch = self._batch_size * context
        self._chunk_tokens = max(chunk_tokens, CHUNK_BATCHES_MIN * self.tokens_per_batch + 1)
        self.held_out_tokens = EVALUATION_WINDOWS * context
        held_out = choose_documents(files, HELD_OUT_BYTES_A_TOKEN * (context + 1))
        self._hashes = held_out.hashes
        self._held_out = self._tokenize_held_out(held_out.texts)
        self.held_out_bytes = self._held_out.nbytes
        self._place = Place()
        self._stream: DocumentStream | None = None  # standing at `_place`
        self._chunk: Chunk | None = None
        self.notice = "; ".join(self._list_notices(work.batches_done))

    def batch(self, index: int) -> NDArray[np.int64]:
        """Batch `index` of this peer, int64 (batch_size, context + 1)."""
        chunk = self._chunk
        if chunk is None or index < chunk.first:
            first, self._place = self._position.find(index) or (index, Place(start=index))
            self._stream = None
            chunk = self._fill(first)
        while not chunk.holds(index):
            chunk = self._fill(chunk.first + chunk.batches)
        first = (index - chunk.first) * self._batch_size
        return chunk.windows[first : first + self._batch_size].astype(np.int64)

    def held_out(self) -> NDArray[np.int64]:
        """The windows to evaluate on, evenly spread: int64 (EVALUATION_WINDOWS, context + 1)."""
        last = self._held_out.size - self._context - 1
        starts = np.arange(EVALUATION_WINDOWS, dtype=np.int64) * last // max(1, EVALUATION_WINDOWS - 1)
        windows: NDArray[np.int64] = self._held_out[starts[:, None] + np.arange(self._context + 1)].astype(np.int64)
        return windows

    # -- the buffer --------------------------------------------------------------------------------------------------

    def _fill(self, first: int) -> Chunk:
        """The chunk that begins at `_place` with batch `first`."""
        stream = self._stream
        if stream is None:
            stream = DocumentStream(self._files, self._seed, self._peer, self._hashes, self._place)
        self._stream = None  # what a failed try has read is lost with it: the next one begins where this one did
        tokens = self._read_tokens(stream)
        self._position.note(first, self._place)
        self._stream, self._place = stream, stream.place
        count = (tokens.size - 1) // self._context
        starts = self._shuffle(count, first) * self._context
        windows = tokens[starts[:, None] + np.arange(self._context + 1)]
        self._chunk = Chunk(first=first, windows=windows, batches=count // self._batch_size)
        return self._chunk

    def _read_tokens(self, stream: DocumentStream) -> NDArray[np.int32]:
        found: list[NDArray[np.int32]] = []
        size = 0
        while size < self._chunk_tokens:
            pieces = (piece for piece, _ in cut(iter((next(stream) + "\n",))))
            for ids in self._tokenize(pieces):
                found.append(ids)
                size += ids.size
        return np.concatenate(found)

    def _tokenize(self, pieces: Iterator[str]) -> Iterator[NDArray[np.int32]]:
        while group := list(islice(pieces, PIECES_AT_A_TIME)):
            for ids in self._tokenizer.encode(group):
                yield np.array(ids, dtype=np.int32)

    def _shuffle(self, count: int, first: int) -> NDArray[np.int64]:
        material = self._seed.to_bytes(8, "big") + self._peer
        key = int.from_bytes(blake3(material, derive_key_context="shoal order of windows").digest(16))
        draws = np.random.Philox(key=key, counter=first << 64).random_raw(count)
        return np.argsort(draws, kind="stable").astype(np.int64)

    def _tokenize_held_out(self, texts: tuple[str, ...]) -> NDArray[np.int32]:
        text = "".join(one + "\n" for one in texts)[:HELD_OUT_BYTES_MAX]
        tokens = np.concatenate(list(self._tokenize(piece for piece, _ in cut(iter((text,))))))
        if tokens.size <= self._context:
            problem = f"has {tokens.size} tokens held out, and a window is {self._context + 1} of them"
            raise ConfigError(FIELD, problem, "give more text")
        return tokens

    def _list_notices(self, batches_done: int) -> Iterator[str]:
        if self._files.notice:
            yield self._files.notice
        if batches_done and self._position.find(batches_done) is None:
            known = "nothing is kept of this data set" if self._position.is_empty else "that was too long ago"
            yield f"{FIELD}: where batch {batches_done} was is not known ({known}); documents may come again"


def open_stream(
    choice: DatasetChoice, tokenizer: Tokenizer, *, context: int, work: Work, folder: Path | None
) -> StreamWindows:
    """The data set that this machine has chosen; `folder` keeps the place. Raises ConfigError."""
    files = DatasetFiles(choice, None if folder is None else folder / "datasets")
    about = encode_record(choice) + tokenizer.digest + bytes(work.peer) + work.seed.to_bytes(8, "big")
    shape = f"{context} {work.training.batch_size} {files.count}".encode()
    position = StreamPosition(folder, blake3(about + shape, derive_key_context="shoal stream of documents").digest(16))
    return StreamWindows(files, tokenizer, position, context=context, work=work)
