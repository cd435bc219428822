"""Shards of tokens: what is written, what is read back, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from shoal.node.training.data import read_corpus
from shoal.node.training.shards import (
    PIECES_AT_A_TIME,
    ShardWriter,
    choose_type,
    is_shard,
    open_shard,
    tokenize_files,
    write_shards,
)
from shoal.node.training.tokenizer import ByteTokenizer
from shoal.protocol.errors import ConfigError
from tests.unit.training.lm_samples import END, write_tokenizer

DIGEST = bytes(range(32))


def write(path: Path, ids: list[int], size: int) -> Path:
    with ShardWriter(path, size, DIGEST) as writer:
        writer.write(ids)
    return path


@pytest.mark.parametrize(("size", "width"), [(256, 1), (257, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (1 << 32, 4)])
def test_ids_take_as_many_bytes_as_they_need_and_come_back(tmp_path: Path, size: int, width: int) -> None:
    ids = [0, 1, min(size, 1 << 20) - 1]
    path = write(tmp_path / "a.bin", ids, min(size, (1 << 32) - 1))
    shard = open_shard(path)
    assert choose_type(size).itemsize == width
    assert shard.tokens.tolist() == ids and shard.digest == DIGEST
    assert path.stat().st_size == 64 + len(ids) * shard.tokens.itemsize


def test_the_format_is_the_documented_one(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.bin", [1, 299], 300).read_bytes()
    assert raw == (
        b"SHOALTOK\x01\x00\x02\x00"
        + (300).to_bytes(4, "little")
        + (2).to_bytes(8, "little")
        + DIGEST
        + bytes(8)
        + b"\x01\x00\x2b\x01"
    )


def test_what_is_not_whole_is_refused_by_name(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.bin", list(range(200)), 300).read_bytes()
    path = tmp_path / "b.bin"
    for bad, problem in (
        (raw[:-1], "has 463 bytes, its header says 464"),
        (raw + b"x", "has 465 bytes"),
        (raw[:63], "is no shard"),
        (b"", "is no shard"),
        (b"S" + raw, "is no shard"),
        (raw[:8] + b"\x02" + raw[9:], "of version 2"),
        (raw[:10] + b"\x03" + raw[11:], "tokens of 3 bytes"),
        (raw[:16] + bytes(8) + raw[24:64], "has no token"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ConfigError) as caught:
            open_shard(path)
        assert "b.bin" in caught.value.problem and problem in caught.value.problem


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError), ShardWriter(tmp_path / "a.bin", 300, DIGEST) as writer:
        writer.write([1])
        raise OSError("the disk is full")
    with ShardWriter(tmp_path / "b.bin", 300, DIGEST):
        pass
    assert list(tmp_path.iterdir()) == []


def test_texts_become_shards_of_a_size_with_marks_between_documents(tmp_path: Path) -> None:
    texts = [f"text {number} é" for number in range(1000)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{}\n")
    (tmp_path / "in" / "b.txt").write_text("plain")
    written = write_shards([tmp_path / "in"], tmp_path / "out", ByteTokenizer(), 10, 3000)
    ids = np.concatenate([open_shard(path).tokens for path in written.paths])
    assert bytes(ids) == "".join(f"{text}\n" for text in [*texts, "plain"]).encode()
    assert written.tokens == len(ids)
    sizes = [len(open_shard(path).tokens) for path in written.paths]
    assert len(sizes) > 3 and all(3000 <= size < 3020 for size in sizes[:-1])
    assert [path.name for path in written.paths[:2]] == ["00000.bin", "00001.bin"]
    assert "1 of 1001 lines of JSON" in written.notice


def test_memory_is_bounded_by_a_group_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []

    class Counted(ByteTokenizer):
        def encode(self, texts: list[str]) -> list[list[int]]:  # type: ignore[override]
            groups.append(sum(map(len, texts)))
            return super().encode(texts)

    monkeypatch.setattr("shoal.node.training.documents.PIECE_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("line\n" * 100_000)
    write_shards([tmp_path / "a.txt"], tmp_path / "out", Counted())
    assert sum(groups) == 500_000 and max(groups) <= PIECES_AT_A_TIME * 1000


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="an extra")
    path = write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "in").mkdir()
    text = tmp_path / "in" / "a.txt"
    text.write_text("the end")

    def refuse(texts: list[Path], out: str = "out", end: str | None = None, tokens_max: int = 100) -> str:
        with pytest.raises(ConfigError) as caught:
            tokenize_files(texts, tmp_path / out, path, end, tokens_max, lambda told: None)
        return caught.value.field

    assert refuse([text], end="<|none|>") == "--end"
    assert refuse([text], tokens_max=0) == "--shard-tokens"
    assert refuse([tmp_path / "absent"]) == "TEXT or --out"
    assert refuse([tmp_path / "in"], out="in/out") == "--out"
    (tmp_path / "void").mkdir()
    assert refuse([tmp_path / "void"]) == "TEXT"
    heard: list[str] = []
    written, _ = tokenize_files([text], tmp_path / "done", path, END, 100, heard.append)
    assert open_shard(written.paths[0]).tokens[-1] == open_shard(written.paths[0]).size - 1
    assert heard == [f"{written.tokens} tokens"]
    assert refuse([text], out="done") == "--out", "nothing is written over"
    assert refuse([tmp_path / "done"]) == "TEXT", "shards are no text"


def test_a_task_of_bytes_does_not_take_tokens_for_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [1] * 100_000, 300)
    assert is_shard(path)
    with pytest.raises(ConfigError) as caught:
        read_corpus(tmp_path)
    assert "a.bin holds tokens" in caught.value.problem
    (tmp_path / "a.bin").write_bytes(b"no shard" * 20_000)
    assert read_corpus(tmp_path).train.size > 100_000
