"""How text becomes tokens: the bytes themselves, or a `tokenizer.json` of the Hugging Face tokenizers library.

All peers of a swarm must use the same one. The manifest has the BLAKE3 of its file, the file is each machine's own
(`trainer.tokenizer`). The library is imported where a tokenizer is opened; a digest needs none. Needs no torch.

Invariant: an open tokenizer is the one with the digest that was asked for.
"""

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from shoal.node.training.task_faults import TaskFault, blame
from shoal.protocol.errors import ConfigError

BYTES = "bytes"
BYTE_IDS = 256
FIELD = "trainer.tokenizer"
FILE_BYTES_MAX = 1 << 26
INSTALL_HF = "install it: pip install 'shoal[hf]'"

_PREFIX = "blake3:"
_DIGEST_BYTES = 32


class Tokenizer(Protocol):
    @property
    def digest(self) -> bytes:
        """BLAKE3 of its file; zeros for bytes."""
        ...

    @property
    def size(self) -> int:
        """All its ids are smaller than this."""
        ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> bytes: ...


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    digest = bytes(_DIGEST_BYTES)
    size = BYTE_IDS

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode(errors="replace")) for text in texts]

    def decode(self, ids: Sequence[int]) -> bytes:
        return bytes(ids)


class FileTokenizer:
    """A `tokenizer.json`. What it adds around a text, its padding and its truncation are left out."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError naming the file."""
        raw, self.size = read_file(path)
        try:
            library: Any = import_module("tokenizers")
        except ModuleNotFoundError as error:
            problem = f"needs the library tokenizers: there is no {error.name} here"
            raise ConfigError(FIELD, problem, INSTALL_HF) from error
        try:
            with blame("tokenizers"):
                self._inner: Any = library.Tokenizer.from_str(raw.decode())
        except TaskFault as fault:
            fix = "write it with the tokenizers library's `save`"
            raise ConfigError(FIELD, f"{path} is no tokenizer.json: {fault}"[:400], fix) from fault
        self._inner.no_padding()
        self._inner.no_truncation()
        self.digest: bytes = blake3(raw).digest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> bytes:
        text: str = self._inner.decode(list(ids), skip_special_tokens=False)
        return text.encode(errors="replace")

    def find(self, token: str) -> int | None:
        """The id of a token by its text."""
        found: int | None = self._inner.token_to_id(token)
        return found


def read_file(path: Path) -> tuple[bytes, int]:
    """A tokenizer's file, and one more than the largest id in it; raises ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror or error}"
        raise ConfigError(FIELD, problem, "give the path of a tokenizer.json") from error
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(FIELD, f"{path} is larger than {FILE_BYTES_MAX} bytes", "give the path of a tokenizer.json")
    try:
        return raw, count_ids(raw)
    except ConfigError as error:
        raise ConfigError(FIELD, f"{path} {error.problem}", error.fix) from error


def count_ids(raw: bytes) -> int:
    """One more than the largest id in a tokenizer's file; raises ConfigError where that is none."""
    try:
        document = json.loads(raw)
        vocabulary = document["model"]["vocab"]
        own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        ids = [*own, *(token["id"] for token in document.get("added_tokens") or ())]
        if not all(type(one) is int and one >= 0 for one in ids):
            raise ValueError("an id is no whole number")
        largest: int = max(ids)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fix = "give a tokenizer.json as the tokenizers library saves it"
        raise ConfigError(FIELD, f"is no tokenizer.json ({type(error).__name__}: {error})"[:400], fix) from error
    return largest + 1


def open_tokenizer(digest: bytes, path: Path | None) -> Tokenizer:
    """The tokenizer of a swarm, in the file that this machine names; raises ConfigError."""
    if digest == ByteTokenizer.digest:
        return ByteTokenizer()
    wanted = write_digest(digest)
    fix = f"get the tokenizer.json with {wanted} from whoever made the swarm and name it in trainer.tokenizer"
    if path is None:
        raise ConfigError(FIELD, "is missing: this swarm trains on the tokens of a tokenizer", fix)
    tokenizer = FileTokenizer(path)
    if tokenizer.digest != digest:
        raise ConfigError(FIELD, f"{path} is {write_digest(tokenizer.digest)}, another one than the swarm's", fix)
    return tokenizer


def write_digest(digest: bytes) -> str:
    """As it stands in a manifest."""
    return BYTES if digest == ByteTokenizer.digest else _PREFIX + digest.hex()


def parse_digest(text: str) -> bytes | None:
    """Inverse of `write_digest`; None where it is no such text."""
    if text == BYTES:
        return ByteTokenizer.digest
    try:
        digest = bytes.fromhex(text.removeprefix(_PREFIX))
    except ValueError:
        return None
    return digest if text.startswith(_PREFIX) and len(digest) == _DIGEST_BYTES and any(digest) else None
