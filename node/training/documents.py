"""Files of text on this machine: which ones a path means, and the texts in them.

Of a file of JSON lines (`.jsonl`) and of a Parquet file (`.parquet`) the field or column "text" is read, of any other
file all bytes. What has no text is counted, and a file with more of that than of texts is refused.

Invariant: memory is bounded by JSON_LINE_BYTES_MAX, PARQUET_ROWS, one document and what the caller asks for, however
large a file is.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from shoal.protocol.errors import ConfigError

JSON_LINES = ".jsonl"
JSON_LINE_BYTES_MAX = 1 << 24  # of what is longer, the pieces are lines without a text
PARQUET = ".parquet"
PARQUET_ROWS = 256  # that are in memory at a time
COLUMN = "text"
PIECE_CHARACTERS = 1 << 16
FIELD = "trainer.text"
INSTALL_PARQUET = "install it: pip install 'shoal[data]'"

_ROW_NAMES = {JSON_LINES: "lines of JSON", PARQUET: "rows of Parquet"}


class TextFiles:
    """Reads files, and counts what of them has no text."""

    def __init__(self) -> None:
        self._rows = dict.fromkeys(_ROW_NAMES, 0)
        self._bad = dict.fromkeys(_ROW_NAMES, 0)

    @property
    def notice(self) -> str:
        told = (
            f"{FIELD}: {bad} of {self._rows[suffix]} {_ROW_NAMES[suffix]} have no {json.dumps(COLUMN)} and are left out"
            for suffix, bad in self._bad.items()
            if bad
        )
        return "; ".join(told)

    def read(self, file: Path, bytes_max: int) -> memoryview:
        """The file's bytes, or its texts in UTF-8 with a line break after each, cut off at `bytes_max`. Raises OSError,
        and ConfigError where the file is not what its name says."""
        if file.suffix not in _ROW_NAMES:
            with file.open("rb") as source:
                return memoryview(source.read(bytes_max))
        found, texts = bytearray(), _Texts(file)
        for text in texts:
            found += text.encode(errors="replace") + b"\n"
            if len(found) >= bytes_max:
                break
        self._settle(file, texts)
        return memoryview(found)[:bytes_max]

    def pieces(self, file: Path) -> Iterator[tuple[str, bool]]:
        """The file's documents in pieces of about PIECE_CHARACTERS at most, each with whether its document ends with
        it. Every text of a table is a document, and any other file is one. Raises as `read` does."""
        if file.suffix in _ROW_NAMES:
            texts = _Texts(file)
            for text in texts:
                yield from cut(iter((text,)))
            self._settle(file, texts)
        else:
            with file.open("rb") as source:
                yield from cut(decode(iter(lambda: source.read(PIECE_CHARACTERS), b"")))

    def _settle(self, file: Path, texts: "_Texts") -> None:
        """Count what was read of a table. Raises ConfigError where more than half of the rows have no text: that is
        another kind of file."""
        self._rows[file.suffix] += texts.rows
        self._bad[file.suffix] += texts.bad
        if 2 * texts.bad > texts.rows:
            problem = f"{file} has no text in {texts.bad} of {texts.rows} {_ROW_NAMES[file.suffix]}"
            raise ConfigError(FIELD, problem, f'give it a string in "{COLUMN}" in each of them')


class _Texts:
    """The texts of a table, with a count of the rows that were read and of those that have none."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows = self.bad = 0

    def __iter__(self) -> Iterator[str]:
        read = _read_parquet if self._file.suffix == PARQUET else _read_json_lines
        for text in read(self._file):
            self.rows += 1
            if text is None:
                self.bad += 1
            else:
                yield text


def list_files(root: Path, suffix: str = "", skipped: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The file itself, or the files under a folder that are not hidden, sorted folder by folder."""
    if not root.is_dir():
        yield root
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        for name in sorted(names):
            file = Path(folder, name)
            if name.endswith(suffix) and not name.startswith(".") and file.is_file():
                yield file


def name_file(file: Path, root: Path) -> bytes:
    """What the file is called on every machine that has this folder."""
    return file.relative_to(root).as_posix().encode() if file != root else file.name.encode()


def decode(chunks: Iterable[bytes]) -> Iterator[str]:
    """The text of a document's bytes; what is not UTF-8 becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for raw in chunks:
        yield decoder.decode(raw)
    yield decoder.decode(b"", final=True)


def cut(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """One document, cut behind line breaks where it has any: a tokenizer makes other tokens of half a word."""
    rest = ""
    for text in texts:
        rest += text
        first = 0
        while len(rest) - first > PIECE_CHARACTERS:
            last = first + PIECE_CHARACTERS
            end = rest.rfind("\n", first, last) + 1 or last
            yield rest[first:end], False
            first = end
        rest = rest[first:]
    yield rest, True


def _read_json_lines(file: Path) -> Iterator[str | None]:
    with file.open("rb") as source:
        while line := source.readline(JSON_LINE_BYTES_MAX):
            if not line.isspace():
                yield _find_text(line)


def _find_text(line: bytes) -> str | None:
    """The string in the field "text" of a JSON object; None where the line is no such thing."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    text = found.get(COLUMN) if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


def _read_parquet(file: Path) -> Iterator[str | None]:
    """The column "text" row by row; None where a row has none."""
    try:
        pyarrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ConfigError(FIELD, f"{file} needs pyarrow: there is no {error.name} here", INSTALL_PARQUET) from error
    try:
        with parquet.ParquetFile(file) as source:
            schema = source.schema_arrow
            if COLUMN not in schema.names:
                names = ", ".join(schema.names[:8]) or "none"
                fix = f'rename the column of its texts to "{COLUMN}"'
                raise ConfigError(FIELD, f'{file} has no column "{COLUMN}" (its columns: {names})', fix)
            if not _is_text(pyarrow.types, schema.field(COLUMN).type):
                problem = f'the column "{COLUMN}" of {file} is {schema.field(COLUMN).type}'
                raise ConfigError(FIELD, problem, "write strings into it")
            for batch in source.iter_batches(PARQUET_ROWS, columns=[COLUMN], use_threads=False):
                # As bytes: pyarrow checks no UTF-8, and one bad row is not to cost the file.
                for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    yield None if value is None else value.decode(errors="replace")
    except (pyarrow.ArrowException, EOFError) as error:
        problem = f"{file} is no whole Parquet file: {' '.join(str(error).split())[:200]}"
        raise ConfigError(FIELD, problem, "copy or write it again") from error


def _is_text(types: Any, kind: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in checks)
