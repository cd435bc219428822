"""The text: what is read, what is held out, and which windows a peer draws."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.node.training.data import (
    BLOCK_BYTES,
    CORPUS_BYTES_MIN,
    SHARE_BLOCKS,
    ByteWindows,
    Corpus,
    Draws,
    read_corpus,
)
from shoal.protocol.errors import ConfigError

FILES = 40
FILE_BYTES = 8000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files, each full of one byte value of its own."""
    for index in range(FILES):
        file = tmp_path / f"part{index % 3}" / f"{index:02}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([index]) * FILE_BYTES)
    (tmp_path / ".hidden").write_bytes(b"\xff" * FILE_BYTES)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"\xff" * FILE_BYTES)
    return tmp_path


def make_windows(peer: bytes = b"a" * 32, seed: int = 1) -> ByteWindows:
    text = np.arange(100_000, dtype=np.uint32).astype(np.uint8)
    return ByteWindows(Corpus(train=text, held_out=text[:5000]), context=16, batch_size=8, seed=seed, peer=peer)


def test_a_folder_is_read_in_sorted_order_without_its_hidden_files(folder: Path) -> None:
    corpus = read_corpus(folder)
    assert corpus.train.size + corpus.held_out.size == FILES * FILE_BYTES
    assert 0xFF not in corpus.train
    order = [*range(0, FILES, 3), *range(1, FILES, 3), *range(2, FILES, 3)]
    seen = list(dict.fromkeys(corpus.train.tolist()))
    assert seen == [value for value in order if value in seen]


def test_small_files_are_held_out_whole_and_nothing_is_in_both(folder: Path) -> None:
    corpus = read_corpus(folder)
    held_out, train = set(corpus.held_out.tolist()), set(corpus.train.tolist())
    assert held_out.isdisjoint(train)
    assert held_out | train == set(range(FILES))
    assert corpus.held_out.size == FILE_BYTES, "one file of forty is the least that makes two per cent"


def test_the_split_depends_on_names_and_not_on_the_place(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("copy") / "moved"
    folder.rename(elsewhere)
    moved = read_corpus(elsewhere)
    elsewhere.rename(folder)
    assert (moved.held_out == read_corpus(folder).held_out).all()


def test_a_large_file_is_held_out_in_blocks(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    blocks = 100
    file.write_bytes(b"".join(bytes([index]) * BLOCK_BYTES for index in range(blocks)))
    corpus = read_corpus(file)
    assert corpus.held_out.size == 2 * BLOCK_BYTES
    assert set(corpus.held_out.tolist()).isdisjoint(corpus.train.tolist())


def test_reading_stops_at_the_bound(folder: Path) -> None:
    bound = CORPUS_BYTES_MIN + 100
    corpus = read_corpus(folder, bound)
    assert corpus.train.size + corpus.held_out.size == bound


def test_files_that_go_while_training_are_not_missed(folder: Path) -> None:
    corpus = read_corpus(folder)
    windows = ByteWindows(corpus, context=16, batch_size=8, seed=1, peer=bytes(32))
    held_out, batch = windows.held_out(), windows.batch(0)
    for path in folder.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert (windows.held_out() == held_out).all()
    assert (windows.batch(0) == batch).all()
    with pytest.raises(ConfigError):
        read_corpus(folder)


def write_lines(path: Path, lines: list[object]) -> Path:
    """Objects as JSON, a line each; what is text already stays as it is."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read_back(corpus: Corpus) -> bytes:
    """All bytes, sorted: the split mixes the blocks."""
    return bytes(sorted(corpus.train.tobytes() + corpus.held_out.tobytes()))


def test_of_json_lines_the_texts_are_read(tmp_path: Path) -> None:
    texts = [f"{number} é\n☃" * 500 for number in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "id": 3} for text in texts] + [""])
    corpus = read_corpus(path)
    assert corpus.notice == ""
    assert read_back(corpus) == bytes(sorted("".join(f"{text}\n" for text in texts).encode()))
    (tmp_path / "b.txt").write_bytes(b"{" * 1000)
    assert read_back(read_corpus(tmp_path)).count(b"{") == 1000, "other files are read as they are"


BAD_LINES = ["{", "[1]", "3", '{"text": 3}', '{"body": "x"}', "[" * 100_000, '"text"']


def test_lines_without_a_text_are_counted_and_left_out(tmp_path: Path) -> None:
    good = [{"text": "x" * 10_000}] * len(BAD_LINES)
    corpus = read_corpus(write_lines(tmp_path / "a.jsonl", [*BAD_LINES, *good]))
    assert read_back(corpus) == b"\n" * len(good) + b"x" * 10_000 * len(good)
    assert f"{len(BAD_LINES)} of {2 * len(BAD_LINES)} lines" in corpus.notice
    assert ByteWindows(corpus, context=16, batch_size=8, seed=1, peer=bytes(32)).notice == corpus.notice


def test_a_file_of_mostly_other_lines_is_refused(tmp_path: Path) -> None:
    good = [{"text": "x" * 20_000}] * (len(BAD_LINES) - 1)
    with pytest.raises(ConfigError) as caught:
        read_corpus(write_lines(tmp_path / "a.jsonl", [*BAD_LINES, *good]))
    assert caught.value.field == "trainer.text"
    assert f"a.jsonl has no text in {len(BAD_LINES)} of {len(BAD_LINES) + len(good)} lines" in caught.value.problem


def test_reading_of_json_lines_stops_at_the_bound(tmp_path: Path) -> None:
    bound = CORPUS_BYTES_MIN + 100
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 100 + BAD_LINES * 50)
    corpus = read_corpus(path, bound)
    assert corpus.train.size + corpus.held_out.size == bound
    assert corpus.notice == "", "what comes after the bound is not looked at"


def test_text_that_is_no_unicode_is_read_with_marks(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ['{"text": "\\ud800%s"}' % ("x" * 70_000)])
    assert read_back(read_corpus(path)).count(b"?") == 1


def test_the_default_is_the_standard_library_without_tests() -> None:
    corpus = read_corpus(None, 2_000_000)
    assert corpus.train.size + corpus.held_out.size == 2_000_000
    text = corpus.train.tobytes()
    assert b"import sys" in text
    assert 0.015 < corpus.held_out.size / 2_000_000 < 0.035


@pytest.mark.parametrize("name", ["absent", "short.txt", "empty"])
def test_text_that_cannot_be_used_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "short.txt").write_bytes(b"x" * (CORPUS_BYTES_MIN - 1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_corpus(tmp_path / name)
    assert caught.value.field == "trainer.text"
    assert name in caught.value.problem


def test_a_batch_is_a_function_of_seed_peer_and_index() -> None:
    windows = make_windows()
    forward = [windows.batch(index) for index in range(5)]
    again = make_windows()
    for index in reversed(range(5)):
        assert (again.batch(index) == forward[index]).all()
    for other in (make_windows(peer=b"b" * 32), make_windows(seed=2)):
        assert all((other.batch(index) != forward[index]).any() for index in range(5))
    for one, next_one in pairwise(forward):
        assert (one != next_one).any()


def test_windows_are_runs_of_the_text() -> None:
    batch = make_windows().batch(3)
    assert batch.shape == (8, 17)
    assert batch.dtype == np.int64
    assert (np.diff(batch, axis=1) % 256 == 1).all()


def test_windows_reach_both_ends_of_the_text() -> None:
    text = np.arange(20, dtype=np.uint8)
    windows = ByteWindows(Corpus(train=text, held_out=text), context=16, batch_size=64, seed=1, peer=bytes(32))
    assert set(windows.batch(0)[:, 0].tolist()) == {0, 1, 2, 3}
    held_out = windows.held_out()
    assert held_out[0, 0] == 0
    assert held_out[-1, -1] == 19


def test_the_batches_are_the_same_on_every_machine() -> None:
    # A peer that resumes under another version of numpy must draw what it would have drawn.
    assert make_windows().batch(12345)[:, 0].tolist() == [243, 24, 134, 103, 216, 80, 139, 144]


# -- shares of data that are divided -----------------------------------------------------------------------------------


def draw_all(place: int, places: int, below: int) -> set[int]:
    """What this peer draws in many batches."""
    draws = Draws(7, bytes([place]) * 32)
    draws.take_share(place, places)
    return {number for index in range(40) for number in draws.draw(index, 1000, below).tolist()}


def test_shares_have_nothing_in_common_and_are_spread_over_all_of_the_data() -> None:
    below = 3 * SHARE_BLOCKS * 5 + 100  # blocks of five, and a rest that nobody has
    shares = [draw_all(place, 3, below) for place in range(3)]
    assert set.union(*shares) == set(range(below - 100)) and sum(map(len, shares)) == below - 100
    for place, share in enumerate(shares):
        assert share == {number for number in range(below - 100) if number // 5 % 3 == place}


def test_without_shares_and_of_few_examples_everything_is_drawn() -> None:
    plain = Draws(7, bytes(32)).draw(3, 1000, 5000)
    draws = Draws(7, bytes(32))
    draws.take_share(0, 1)
    assert np.array_equal(draws.draw(3, 1000, 5000), plain)
    assert draw_all(1, 2, 2 * SHARE_BLOCKS - 1) == set(range(2 * SHARE_BLOCKS - 1))
    draws.take_share(1, 2)
    assert not np.array_equal(draws.draw(3, 1000, 5000), plain)
