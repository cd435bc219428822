"""Files of text: Parquet, and the pieces that a tokenizer gets."""

import sys
from pathlib import Path

import pytest

from shoal.node.training.data import read_corpus
from shoal.node.training.documents import PARQUET_ROWS, PIECE_CHARACTERS, TextFiles
from shoal.protocol.errors import ConfigError
from tests.unit.training.lm_samples import write_parquet

pyarrow = pytest.importorskip("pyarrow", reason="an extra")
ROWS = [f"row {number} é\n☃" * 40 for number in range(3 * PARQUET_ROWS)]


def refuse(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_corpus(path)
    assert caught.value.field == "trainer.text"
    assert path.name in caught.value.problem
    return caught.value


@pytest.mark.parametrize(
    "kind",
    [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
)
def test_of_a_parquet_file_the_column_text_is_read(tmp_path: Path, kind: object) -> None:
    column = pyarrow.array(ROWS).cast(kind)
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(len(ROWS))), "text": column})
    files = TextFiles()
    assert bytes(files.read(path, 1 << 30)) == "".join(f"{row}\n" for row in ROWS).encode()
    assert files.notice == ""
    corpus = read_corpus(path)
    assert corpus.train.size + corpus.held_out.size == sum(len(row.encode()) + 1 for row in ROWS)


def test_reading_of_parquet_stops_at_the_bound(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ROWS})
    assert bytes(TextFiles().read(path, 1000)) == "".join(f"{row}\n" for row in ROWS).encode()[:1000]


def test_rows_without_a_text_are_counted_and_a_file_of_mostly_those_is_refused(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", {"text": [*ROWS, None, None]})
    assert f"2 of {len(ROWS) + 2} rows of Parquet" in read_corpus(good).notice
    bad = write_parquet(tmp_path / "bad.parquet", {"text": ["x" * 100_000, None, None]})
    assert "in 2 of 3 rows of Parquet" in refuse(bad).problem


def test_bytes_that_are_no_utf8_are_marked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array([b"a\xffb"], type=pyarrow.binary())})
    assert bytes(TextFiles().read(path, 1000)) == "a\ufffdb\n".encode()


def test_parquet_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    other = write_parquet(tmp_path / "other.parquet", {"body": ["x"], "id": [1]})
    assert "(its columns: body, id)" in refuse(other).problem
    numbers = write_parquet(tmp_path / "numbers.parquet", {"text": [1, 2]})
    assert "is int64" in refuse(numbers).problem
    whole = write_parquet(tmp_path / "cut.parquet", {"text": ROWS})
    whole.write_bytes(whole.read_bytes()[:-100])
    assert "is no whole Parquet file" in refuse(whole).problem
    (tmp_path / "empty.parquet").touch()
    refuse(tmp_path / "empty.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    refuse(tmp_path / "damaged.parquet")


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ROWS})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError) as caught:
        read_corpus(path)
    assert "shoal[data]" in caught.value.fix


def test_pieces_are_bounded_end_at_lines_and_miss_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"line {number} größer ☃\n" for number in range(20_000)) + "x" * (3 * PIECE_CHARACTERS)
    path.write_text(text)
    pieces = list(TextFiles().pieces(path))
    assert "".join(piece for piece, _ in pieces) == text
    assert max(len(piece) for piece, _ in pieces) <= PIECE_CHARACTERS
    assert [is_end for _, is_end in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.endswith("\n") for piece, _ in pieces) == len(pieces) - 3, "all but those of the long line"


def test_each_row_is_a_document(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None, "", "x" * (PIECE_CHARACTERS + 1), "two"]})
    found = list(TextFiles().pieces(path))
    assert [(piece[:3], is_end) for piece, is_end in found] == [
        ("one", True),
        ("", True),
        ("xxx", False),
        ("x", True),
        ("two", True),
    ]


def test_a_plain_file_that_is_no_utf8_is_read_with_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 ol\xe9")
    assert list(TextFiles().pieces(path)) == [("caf\ufffd ol\ufffd", True)]
