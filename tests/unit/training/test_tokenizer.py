"""Tokenizers: which one is the swarm's, and what another one is told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from shoal.node.training.tokenizer import (
    BYTES,
    ByteTokenizer,
    FileTokenizer,
    count_ids,
    open_tokenizer,
    parse_digest,
    write_digest,
)
from shoal.protocol.errors import ConfigError
from tests.unit.training.lm_samples import END, MERGES, write_tokenizer

pytest.importorskip("tokenizers", reason="an extra")
TEXT = 'the inner "größer ≥ 日本"\n\tthe end'


def test_bytes_are_tokens() -> None:
    tokenizer = open_tokenizer(ByteTokenizer.digest, None)
    assert tokenizer.encode([TEXT]) == [list(TEXT.encode())]
    assert tokenizer.decode(tokenizer.encode([TEXT])[0]) == TEXT.encode()
    assert tokenizer.size == 256


def test_a_file_is_read_and_its_tokens_are_the_text(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = open_tokenizer(blake3(path.read_bytes()).digest(), path)
    assert isinstance(tokenizer, FileTokenizer)
    (ids,) = tokenizer.encode([TEXT])
    assert len(ids) < len(TEXT.encode()) and tokenizer.decode(ids) == TEXT.encode()
    assert tokenizer.size == 256 + len(MERGES) + 1 and tokenizer.find(END) == tokenizer.size - 1
    assert tokenizer.find("<|none|>") is None


def test_what_a_file_adds_pads_and_cuts_off_is_left_out(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    plain = FileTokenizer(path).encode(["the", TEXT])
    document = json.loads(path.read_text())
    document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    path.write_text(json.dumps(document))
    assert FileTokenizer(path).encode(["the", TEXT]) == plain


def test_another_or_a_missing_file_is_told_with_the_digest(tmp_path: Path) -> None:
    path, other = write_tokenizer(tmp_path / "a.json"), write_tokenizer(tmp_path / "b.json", MERGES[:3])
    digest = blake3(path.read_bytes()).digest()
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(digest, None)
    assert caught.value.field == "trainer.tokenizer" and digest.hex() in caught.value.fix
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(digest, other)
    assert "b.json" in caught.value.problem and blake3(other.read_bytes()).hexdigest() in caught.value.problem
    assert digest.hex() in caught.value.fix


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"model": {"vocab": {"a": "b"}}}',
        b'{"model": {"vocab": {}}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}}}',
        b"[" * 100_000,
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        FileTokenizer(path)
    assert caught.value.field == "trainer.tokenizer" and "tokenizer.json" in caught.value.problem
    with pytest.raises(ConfigError):
        FileTokenizer(tmp_path / "absent")


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError) as caught:
        FileTokenizer(path)
    assert "shoal[hf]" in caught.value.fix


def test_ids_are_counted_by_the_largest() -> None:
    assert count_ids(b'{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}') == 2
    assert count_ids(b'{"model": {"vocab": {"a": 3}}, "added_tokens": [{"id": 9}]}') == 10


def test_digests_are_read_back() -> None:
    assert parse_digest(BYTES) == ByteTokenizer.digest and write_digest(ByteTokenizer.digest) == BYTES
    digest = bytes(range(32))
    assert parse_digest(write_digest(digest)) == digest
    for text in (
        "",
        "blake3:",
        "blake3:00",
        digest.hex(),
        write_digest(digest) + "00",
        "blake3:" + "00" * 32,
        "a.json",
    ):
        assert parse_digest(text) is None, text


def test_the_documented_snippet_trains_one(tmp_path: Path) -> None:
    docs = (Path(__file__).parents[3] / "docs/tasks.md").read_text()
    (snippet,) = (block for block in docs.split("```python\n")[1:] if "from tokenizers" in block)
    (tmp_path / "text.txt").write_text("the end of the inner line\n" * 1000)
    subprocess.run([sys.executable, "-c", snippet.partition("```")[0]], cwd=tmp_path, check=True, timeout=120)
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.find("<|endoftext|>") is not None
    (ids,) = tokenizer.encode(["the inner line"])
    assert len(ids) <= 4 and tokenizer.decode(ids) == b"the inner line"
