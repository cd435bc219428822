"""The tokens a peer trains on: out of shards on the disk, or of text that is tokenized once and kept beside them.

Shards are split as text is (data.py): in blocks, held out in the order of the hash of (file name, block number). Text
is split first and tokenized then, so that the same text is held out whatever the tokenizer is.

Invariants: those of data.py, but that shards are read where they lie: who removes one does no harm, who shortens one
while it is trained on ends the trainer. Every id that leaves this module is below the model's vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from shoal.node.training.data import (
    BLOCK_BYTES,
    EVALUATION_WINDOWS,
    HELD_OUT_SHARE,
    Corpus,
    Draws,
    choose_held_out,
    hash_block,
    list_text_files,
    read_corpus,
)
from shoal.node.training.documents import FIELD, PIECE_CHARACTERS, cut, decode, list_files, name_file
from shoal.node.training.messages import Work
from shoal.node.training.shards import (
    PIECES_AT_A_TIME,
    SHARD_SUFFIX,
    Shard,
    ShardWriter,
    choose_type,
    open_shard,
)
from shoal.node.training.tokenizer import Tokenizer, write_digest
from shoal.protocol.errors import ConfigError

SHARDS_MAX = 512  # each is an open file of the process
BLOCK_TOKENS = 1 << 14
HELD_OUT_TOKENS_MIN = 1 << 11
HELD_OUT_TOKENS_MAX = 1 << 22
TEXT_BYTES_MAX = 1 << 24  # that are tokenized at a start, which has two minutes

_CACHE_VERSION = b"2"
_PARTS = (".train" + SHARD_SUFFIX, ".held_out" + SHARD_SUFFIX)
_NOTICE = ".notice"

Ids = NDArray[Any]
Run = tuple[int, int, int]  # the file's number, the first token in it, one past the last


class TokenRuns:
    """Runs of several arrays, as one sequence without gaps."""

    def __init__(self, arrays: Sequence[tuple[str, Ids]], runs: Sequence[Run]) -> None:
        """`arrays` are (name for errors, ids)."""
        self._arrays = arrays
        table = np.array(runs, dtype=np.int64).reshape(-1, 3)
        self._numbers, self._firsts = table[:, 0], table[:, 1]
        sizes = table[:, 2] - table[:, 1]
        self._starts = np.cumsum(sizes) - sizes
        self.size = int(sizes.sum())
        self.nbytes = sum((end - first) * arrays[number][1].itemsize for number, first, end in runs)

    def windows(self, starts: NDArray[np.int64], length: int, below: int) -> NDArray[np.int64]:
        """`length` tokens from each start on, int64 (starts, length); ValueError where an id is not `below`."""
        places = (starts[:, None] + np.arange(length)).ravel()
        runs = np.searchsorted(self._starts, places, side="right") - 1
        numbers, offsets = self._numbers[runs], self._firsts[runs] + places - self._starts[runs]
        found = np.empty(places.size, dtype=np.int64)
        for number in np.unique(numbers):
            name, ids = self._arrays[number]
            here = numbers == number
            found[here] = ids[offsets[here]]
            if (largest := int(found[here].max())) >= below:
                raise ValueError(f"{name} holds the token {largest}, and the model's vocabulary ends before {below}")
        return found.reshape(len(starts), length)


class TokenWindows:
    """Batches of windows of `context` + 1 tokens: the last `context` of them are to be predicted."""

    def __init__(
        self, train: TokenRuns, held_out: TokenRuns, *, context: int, vocabulary: int, work: Work, notice: str = ""
    ) -> None:
        """Raises ConfigError where there are too few tokens, or a held-out one is beyond the vocabulary."""
        for what, runs in (("to train on", train), ("held out", held_out)):
            if runs.size <= context:
                problem = f"has {runs.size} tokens {what}, and a window is {context + 1} of them"
                raise ConfigError(FIELD, problem, "give more text, or more shards")
        self._train, self._held_out = train, held_out
        self._context, self._vocabulary = context, vocabulary
        self._batch_size = work.training.batch_size
        self._draws = Draws(work.seed, work.peer)
        self.train_bytes, self.held_out_bytes = train.nbytes, held_out.nbytes
        self.tokens_per_batch = self._batch_size * context
        self.held_out_tokens = EVALUATION_WINDOWS * context
        self.notice = notice
        try:
            self.held_out()
        except ValueError as error:
            raise ConfigError(FIELD, str(error), "make it again with the swarm's tokenizer") from error

    def take_share(self, place: int, places: int) -> None:
        self._draws.take_share(place, places)

    def batch(self, index: int) -> NDArray[np.int64]:
        """Batch `index` of this peer, int64 (batch_size, context + 1)."""
        starts = self._draws.draw(index, self._batch_size, self._train.size - self._context)
        return self._train.windows(starts, self._context + 1, self._vocabulary)

    def held_out(self) -> NDArray[np.int64]:
        """The windows to evaluate on, evenly spread: int64 (EVALUATION_WINDOWS, context + 1)."""
        last = self._held_out.size - self._context - 1
        starts = np.arange(EVALUATION_WINDOWS, dtype=np.int64) * last // max(1, EVALUATION_WINDOWS - 1)
        return self._held_out.windows(starts, self._context + 1, self._vocabulary)


def open_tokens(
    text: Path | None, tokenizer: Tokenizer, *, context: int, vocabulary: int, work: Work, cache: Path | None
) -> TokenWindows:
    """The tokens of `trainer.text`: those of its shards, where it is or has any, else those of its text, which is kept
    in the folder `cache`. Raises ConfigError naming the file."""
    check_size(tokenizer, vocabulary)
    try:
        files = [(file, name_file(file, text)) for file in list_files(text)] if text is not None else []
        shards = [(file, name) for file, name in files if file.suffix == SHARD_SUFFIX]
        if shards:
            opened = [(_open_own_shard(file, tokenizer), name) for file, name in shards[:SHARDS_MAX]]
            others = len(files) - len(opened)
            notice = f"{FIELD}: {others} files beside the first {len(opened)} shards are left out" if others else ""
            train, held_out = split_shards(opened)
        else:
            train, held_out, notice = _open_text(text, tokenizer, cache)
    except OSError as error:
        problem = f"{text or 'the library of Python'} cannot be read: {error.strerror or error}"
        raise ConfigError(FIELD, problem, "name a readable path") from error
    return TokenWindows(train, held_out, context=context, vocabulary=vocabulary, work=work, notice=notice)


def check_size(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raises ConfigError where it has ids that the model does not know."""
    if tokenizer.size > vocabulary:
        problem = f"has {tokenizer.size} ids, and the model's vocabulary is {vocabulary}"
        raise ConfigError("trainer.tokenizer", problem, f"make the swarm with vocab_size = {tokenizer.size} or more")


def _open_own_shard(file: Path, tokenizer: Tokenizer) -> Shard:
    shard = open_shard(file)
    if shard.digest != tokenizer.digest:
        made, wanted = write_digest(shard.digest), write_digest(tokenizer.digest)
        fix = "make it again with the swarm's tokenizer: `shoal tokenize`"
        raise ConfigError(FIELD, f"{file} was made with the tokenizer {made}, the swarm's is {wanted}", fix)
    return shard


def split_shards(shards: Sequence[tuple[Shard, bytes]]) -> tuple[TokenRuns, TokenRuns]:
    """What is trained on and what is held out of (shard, its name on every machine)."""
    blocks: list[tuple[bytes, Run]] = []
    for number, (shard, name) in enumerate(shards):
        count = len(shard.tokens)
        for block, first in enumerate(range(0, count, BLOCK_TOKENS)):
            blocks.append((hash_block(name, block), (number, first, min(first + BLOCK_TOKENS, count))))
    total = sum(len(shard.tokens) for shard, _ in shards)
    wanted = max(HELD_OUT_TOKENS_MIN, min(HELD_OUT_TOKENS_MAX, int(total * HELD_OUT_SHARE)))
    held_out = choose_held_out([(key, last - first) for key, (_, first, last) in blocks], wanted)
    arrays = [(str(shard.path), shard.tokens) for shard, _ in shards]
    train = [run for index, (_, run) in enumerate(blocks) if index not in held_out]
    return TokenRuns(arrays, train), TokenRuns(arrays, [blocks[index][1] for index in sorted(held_out)])


def _open_text(text: Path | None, tokenizer: Tokenizer, cache: Path | None) -> tuple[TokenRuns, TokenRuns, str]:
    """From the cache where these files were tokenized before, as far as their sizes and times tell."""
    key = _identify(text, tokenizer)
    kept = None if cache is None else cache / key
    if kept is not None:
        with suppress(OSError, ConfigError, UnicodeDecodeError):
            opened = [open_shard(kept.with_suffix(suffix)) for suffix in _PARTS]
            notice = kept.with_suffix(_NOTICE).read_text(encoding="utf-8")
            return _make_runs(text, opened[0].tokens), _make_runs(text, opened[1].tokens), notice
    corpus = read_corpus(text, TEXT_BYTES_MAX)
    parts, replaced = [], 0
    for part in (corpus.train, corpus.held_out):
        ids, count = _tokenize(part, tokenizer)
        parts.append(ids)
        replaced += count
    notice = "; ".join(_list_notices(corpus, replaced))
    if kept is not None:
        try:
            _keep(kept, parts, tokenizer, notice)
        except OSError as error:
            notice = f"{FIELD}: the tokens cannot be kept in {cache}: {error.strerror or error}; {notice}"
    return _make_runs(text, parts[0]), _make_runs(text, parts[1]), notice


def _list_notices(corpus: Corpus, replaced: int) -> Iterator[str]:
    total = corpus.train.size + corpus.held_out.size
    if corpus.notice:
        yield corpus.notice
    if total >= TEXT_BYTES_MAX:
        yield f"{FIELD}: the first {TEXT_BYTES_MAX >> 20} MiB are used; `shoal tokenize` makes shards of all"
    # Where blocks part, a character of several bytes becomes four marks at most.
    if replaced > 4 * (total // BLOCK_BYTES + 1):
        yield f"{FIELD}: {replaced} places are U+FFFD, as which what is not UTF-8 is read"


def _make_runs(text: Path | None, ids: Ids) -> TokenRuns:
    return TokenRuns([(str(text), ids)], [(0, 0, len(ids))])


def _tokenize(text: NDArray[np.uint8], tokenizer: Tokenizer) -> tuple[Ids, int]:
    """The ids, and how many places are U+FFFD."""
    kind = choose_type(tokenizer.size)
    found: list[Ids] = []
    replaced = 0
    chunks = (text[first : first + PIECE_CHARACTERS].tobytes() for first in range(0, text.size, PIECE_CHARACTERS))
    pieces = (piece for piece, _ in cut(decode(chunks)))
    while group := list(islice(pieces, PIECES_AT_A_TIME)):
        replaced += sum(piece.count("\ufffd") for piece in group)
        found += [np.array(ids, dtype=kind) for ids in tokenizer.encode(group)]
    return np.concatenate(found), replaced


def _identify(text: Path | None, tokenizer: Tokenizer) -> str:
    """The name under which the tokens of these files are kept."""
    hasher = blake3(_CACHE_VERSION + tokenizer.digest + TEXT_BYTES_MAX.to_bytes(8, "big"))
    for file, name in list_text_files(text):
        about = file.stat()
        hasher.update(b"%s\0%d %d\n" % (name, about.st_size, about.st_mtime_ns))
    return hasher.hexdigest(16)


def _keep(kept: Path, parts: Sequence[Ids], tokenizer: Tokenizer, notice: str) -> None:
    """Write the parts in the place of those of other texts: there is one text at a time."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.iterdir():
        old.unlink()
    kept.with_suffix(_NOTICE).write_text(notice, encoding="utf-8")
    for suffix, ids in zip(_PARTS, parts, strict=True):
        with ShardWriter(kept.with_suffix(suffix), tokenizer.size, tokenizer.digest) as writer:
            writer.write(ids)
