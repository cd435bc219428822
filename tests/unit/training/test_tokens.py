"""Tokens to train on: windows over shards, the split, text that is tokenized once, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.node.training import tokens
from shoal.node.training.data import read_corpus
from shoal.node.training.messages import Work
from shoal.node.training.shards import ShardWriter, open_shard
from shoal.node.training.tokenizer import ByteTokenizer, FileTokenizer
from shoal.node.training.tokens import BLOCK_TOKENS, TokenRuns, TokenWindows, open_tokens, split_shards
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import PeerId
from tests.unit.training.lm_samples import CONTEXT, write_tokenizer
from tests.unit.training.tiny import make_work

VOCABULARY = 300
OTHER = PeerId(b"q" * 32)


def write_shard(path: Path, ids: Any, size: int = 256, digest: bytes = ByteTokenizer.digest) -> Path:
    path.parent.mkdir(exist_ok=True)
    with ShardWriter(path, size, digest) as writer:
        writer.write(np.asarray(ids))
    return path


def open_bytes(path: Path, work: Work | None = None) -> TokenWindows:
    """With a token for each byte."""
    work = work or make_work()
    return open_tokens(path, ByteTokenizer(), context=CONTEXT, vocabulary=VOCABULARY, work=work, cache=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards; in each, every block has a value of its own."""
    for number in range(3):
        ids = np.repeat(np.arange(20) + 20 * number, BLOCK_TOKENS)[: 20 * BLOCK_TOKENS - 100 * number]
        write_shard(tmp_path / "in" / f"{number}.bin", ids)
    return tmp_path / "in"


def list_values(runs: TokenRuns) -> list[int]:
    starts = np.arange(0, runs.size, dtype=np.int64)
    return runs.windows(starts, 1, VOCABULARY)[:, 0].tolist()


def test_blocks_are_held_out_whole_and_nothing_is_in_both(folder: Path) -> None:
    shards = [(open_shard(path), path.name.encode()) for path in sorted(folder.iterdir())]
    train, held_out = split_shards(shards)
    assert train.size + held_out.size == 60 * BLOCK_TOKENS - 300
    trained, kept = set(list_values(train)), set(list_values(held_out))
    assert trained.isdisjoint(kept) and trained | kept == set(range(60)) and len(kept) == 2
    assert [set(list_values(runs)) for runs in split_shards(shards)] == [trained, kept]
    order = list_values(train)
    assert order == sorted(order), "the runs follow each other as they lie in the files"


def test_a_batch_is_a_function_of_seed_peer_and_index_and_survives_a_restart(folder: Path) -> None:
    first, again = open_bytes(folder), open_bytes(folder)
    forward = [first.batch(index) for index in range(4)]
    for index in reversed(range(4)):
        assert (again.batch(index) == forward[index]).all()
    assert forward[0].shape == (8, CONTEXT + 1) and forward[0].dtype == np.int64
    for change in ({"peer": OTHER}, {"seed": 8}):
        other = open_bytes(folder, make_work(changes=change))
        assert any((other.batch(index) != forward[index]).any() for index in range(4))
        assert (other.held_out() == first.held_out()).all()


def test_windows_cross_from_run_to_run_and_file_to_file() -> None:
    arrays = [("a", np.arange(10, dtype="<u2")), ("b", np.arange(100, 110, dtype=np.uint8))]
    runs = TokenRuns(arrays, [(0, 0, 3), (0, 8, 10), (1, 4, 6)])
    assert runs.size == 7 and runs.nbytes == 5 * 2 + 2
    assert runs.windows(np.array([0, 1, 2]), 5, 200).tolist() == [
        [0, 1, 2, 8, 9],
        [1, 2, 8, 9, 104],
        [2, 8, 9, 104, 105],
    ]


def test_draws_reach_every_token(tmp_path: Path) -> None:
    ids = np.tile(np.arange(200), 200)
    windows = open_bytes(write_shard(tmp_path / "a.bin", ids))
    seen = {int(one) for index in range(40) for one in windows.batch(index).ravel()}
    assert seen == set(range(200))
    assert windows.tokens_per_batch == 8 * CONTEXT and windows.held_out_tokens == 64 * CONTEXT
    assert windows.train_bytes + windows.held_out_bytes == 40_000


def test_shards_that_go_while_training_are_not_missed(folder: Path) -> None:
    windows = open_bytes(folder)
    batch = windows.batch(0)
    for path in folder.iterdir():
        path.unlink()
    assert (windows.batch(0) == batch).all()
    with pytest.raises(ConfigError):
        open_bytes(folder)


def refuse(path: Path, word: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        open_bytes(path)
    assert caught.value.field == "trainer.text" and word in caught.value.problem
    return caught.value


def test_shards_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    ids = [1] * 100_000
    refuse(write_shard(tmp_path / "1" / "other.bin", ids, digest=b"x" * 32), "other.bin was made with the tokenizer")
    short = write_shard(tmp_path / "2" / "short.bin", ids)
    short.write_bytes(short.read_bytes()[:-1])
    refuse(tmp_path / "2", "short.bin has 100063 bytes")
    refuse(write_shard(tmp_path / "3" / "few.bin", [1] * CONTEXT), "0 tokens to train on")
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "foreign.bin").write_bytes(b"x" * 100_000)
    refuse(tmp_path / "4", "foreign.bin is no shard")
    refuse(tmp_path / "absent", "cannot be read")


def test_an_id_beyond_the_vocabulary_is_told_with_the_file(tmp_path: Path) -> None:
    """A header may lie: what is held out is looked at first, and the rest as it is drawn."""
    bad = write_shard(tmp_path / "1" / "bad.bin", [256] * 100_000, size=257)
    with pytest.raises(ConfigError) as caught:
        open_tokens(bad, ByteTokenizer(), context=8, vocabulary=256, work=make_work(), cache=None)
    assert "bad.bin holds the token 256" in caught.value.problem
    with pytest.raises(ConfigError) as caught:
        open_tokens(bad, ByteTokenizer(), context=8, vocabulary=255, work=make_work(), cache=None)
    assert caught.value.field == "trainer.tokenizer" and "vocab_size = 256" in caught.value.fix
    arrays = [("a.bin", np.array([1] * 100 + [299])), ("b.bin", np.array([1] * 100))]
    good, late = TokenRuns(arrays, [(1, 0, 100)]), TokenRuns(arrays, [(0, 0, 101)])
    windows = TokenWindows(late, good, context=90, vocabulary=299, work=make_work())
    with pytest.raises(ValueError, match=r"a\.bin holds the token 299"):
        for index in range(100):
            windows.batch(index)


def test_text_beside_shards_is_left_out_and_told(folder: Path) -> None:
    (folder / "README").write_text("how these were made")
    assert "1 files beside the first 3 shards" in open_bytes(folder).notice


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> FileTokenizer:
    pytest.importorskip("tokenizers", reason="an extra")
    return FileTokenizer(write_tokenizer(tmp_path / "tokenizer.json"))


def open_text(path: Path | None, tokenizer: FileTokenizer, cache: Path | None) -> TokenWindows:
    return open_tokens(path, tokenizer, context=CONTEXT, vocabulary=VOCABULARY, work=make_work(), cache=cache)


def write_texts(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"the inner line {number} größer ☃\n" * 400)
    return folder


def test_text_is_tokenized_once_and_kept(
    tmp_path: Path, tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, cache = write_texts(tmp_path / "in"), tmp_path / "cache"
    first = open_text(text, tokenizer, cache)
    batch, held_out = first.batch(3), first.held_out()
    kept = sorted(path.name for path in cache.iterdir())
    assert [name.partition(".")[2] for name in kept] == ["held_out.bin", "notice", "train.bin"]
    monkeypatch.setattr(tokens, "read_corpus", None)  # it is not read again
    again = open_text(text, tokenizer, cache)
    assert (again.batch(3) == batch).all() and (again.held_out() == held_out).all()
    assert (again.train_bytes, again.held_out_bytes) == (first.train_bytes, first.held_out_bytes)


def test_what_is_kept_is_made_again_when_text_or_disk_have_changed(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    text, cache = write_texts(tmp_path / "in"), tmp_path / "cache"
    first = open_text(text, tokenizer, cache).batch(3)
    names = {path.name for path in cache.iterdir()}
    (train,) = cache.glob("*.train.bin")
    train.write_bytes(train.read_bytes()[:-1])
    assert (open_text(text, tokenizer, cache).batch(3) == first).all()
    assert {path.name for path in cache.iterdir()} == names
    (text / "5.txt").write_text("another line\n" * 3000)
    assert (open_text(text, tokenizer, cache).batch(3) != first).any()
    assert len(list(cache.iterdir())) == 3, "that of the older text is gone"


def test_the_split_is_that_of_the_bytes_whatever_the_tokenizer(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    text = write_texts(tmp_path / "in")
    open_text(text, tokenizer, tmp_path / "cache")
    corpus = read_corpus(text)
    for part, expected in (("train", corpus.train), ("held_out", corpus.held_out)):
        (path,) = (tmp_path / "cache").glob(f"*.{part}.bin")
        assert tokenizer.decode(open_shard(path).tokens.tolist()) == expected.tobytes()


def test_a_cache_that_cannot_be_written_costs_a_notice(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    text = write_texts(tmp_path / "in")
    (tmp_path / "file").touch()
    windows = open_text(text, tokenizer, tmp_path / "file" / "cache")
    assert "cannot be kept" in windows.notice
    assert (windows.batch(0) == open_text(text, tokenizer, None).batch(0)).all()


def test_what_is_left_out_of_text_is_told_now_and_after_a_restart(
    tmp_path: Path, tokenizer: FileTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_texts(tmp_path / "in")
    assert open_text(text, tokenizer, None).notice == "", "also where blocks part within a character"
    (text / "a.jsonl").write_text("{}\n" + json.dumps({"text": "the end"}) + "\n")
    (text / "latin").write_bytes("é".encode("latin-1") * 1000)
    monkeypatch.setattr(tokens, "TEXT_BYTES_MAX", 1 << 17)
    for _ in range(2):
        notice = open_text(text, tokenizer, tmp_path / "cache").notice
        assert "the first 0 MiB are used" in notice
    monkeypatch.undo()
    for _ in range(2):
        notice = open_text(text, tokenizer, tmp_path / "cache").notice
        assert "1 of 2 lines of JSON" in notice and "1000 places are U+FFFD" in notice


def test_too_little_text_is_refused_by_name(tmp_path: Path, tokenizer: FileTokenizer) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ConfigError) as caught:
        open_text(tmp_path / "a.txt", tokenizer, None)
    assert "has 5 bytes of text" in caught.value.problem
