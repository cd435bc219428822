"""Where the certificates of a data folder come from: its ledger, or the running daemon that holds the ledger.

A running daemon has the ledger for itself, so it is asked at its local web port. Everything else in the folder
(updates, snapshots, the manifest) is named by its digest or round and read from the disk in both cases.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from shoal.node.ledger_store import LedgerStore, StoreError
from shoal.node.running import read_running
from shoal.node.status import fetch_status
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal
from shoal.protocol.messages import Certificate, CertificatesAnswer, Checkpoint, CheckpointsAnswer
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

LEDGER_FILE = "ledger.sqlite"
ASK_TIMEOUT_S = 10.0
CHECKPOINTS_READ_MAX = 65_536
PAGES_KEPT = 2  # of certificates that a daemon has sent: whoever goes through a log looks at a round and its neighbours


class CertificateSource(Protocol):
    """The certified rounds that one peer knows."""

    @property
    def newest(self) -> int:
        """The newest round that there is a certificate of; 0 before the first."""
        ...

    @property
    def oldest(self) -> int:
        """The oldest one, 0 where there is none. Over the rounds before it the trail leads."""
        ...

    @property
    def own_root(self) -> tuple[int, bytes] | None:
        """The round that a running daemon stands at and its state root there."""
        ...

    def get(self, number: int) -> Certificate | None:
        """The certificate of a round. Raises ProtocolError where its bytes are damaged, ConfigError where the daemon
        does not answer."""
        ...

    def list_checkpoints(self) -> tuple[Checkpoint, ...]:
        """The trail (protocol.trail). Raises what `get` does."""
        ...


class StoredCertificates:
    """Of a peer that does not run."""

    own_root = None

    def __init__(self, store: LedgerStore) -> None:
        self._store = store
        last = store.get_last_certificate()
        self.newest = 0 if last is None else last.round
        self.oldest = store.get_first_round() or 0

    def get(self, number: int) -> Certificate | None:
        stored = self._store.get_certificate(number)
        return None if stored is None else decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)

    def list_checkpoints(self) -> tuple[Checkpoint, ...]:
        found = self._store.list_checkpoints(0, CHECKPOINTS_READ_MAX)
        return tuple(decode_record_untrusted(Checkpoint, body, DELTA_BYTES_MAX) for body in found)


class AskedCertificates:
    """Of a peer that runs, through its web port."""

    def __init__(self, host: str, port: int) -> None:
        status = fetch_status(host, port)
        self.newest = status.round.round - 1
        self.own_root = (self.newest, bytes.fromhex(status.round.state_root))
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._pages: dict[int, tuple[Certificate, ...]] = {}
        first = self._ask_page(1)
        self.oldest = first[0].result.round if first else 0

    def get(self, number: int) -> Certificate | None:
        if number < self.oldest:
            return None
        for first, page in self._pages.items():
            if first <= number < first + len(page):
                return page[number - first]
        page = self._ask_page(number)
        if not page or page[0].result.round > number:
            return None  # not there yet, or dropped meanwhile
        self._pages[number] = page
        while len(self._pages) > PAGES_KEPT:
            del self._pages[next(iter(self._pages))]
        return page[0]

    def list_checkpoints(self) -> tuple[Checkpoint, ...]:
        found: list[Checkpoint] = []
        after = 0
        while len(found) < CHECKPOINTS_READ_MAX:
            raw = self._ask("checkpoints", f"after={after}")
            page = decode_record_untrusted(CheckpointsAnswer, raw, DELTA_BYTES_MAX).checkpoints
            if not page or page[-1].certificate.result.round <= after:
                break
            found += page
            after = page[-1].certificate.result.round
        return tuple(found)

    def _ask_page(self, first: int) -> tuple[Certificate, ...]:
        raw = self._ask("certificates", f"first={first}")
        page = decode_record_untrusted(CertificatesAnswer, raw, DELTA_BYTES_MAX).certificates
        if any(one.result.round != max(first, page[0].result.round) + at for at, one in enumerate(page)):
            raise ProtocolError(Refusal.WRONG_ROUND, f"not the certificates from round {first} on")
        return page

    def _ask(self, path: str, query: str) -> bytes:
        try:
            with urllib.request.urlopen(f"{self._url}/{path}?{query}", timeout=ASK_TIMEOUT_S) as answer:
                raw: bytes = answer.read(DELTA_BYTES_MAX + 1)
        except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
            fix = "stop it and try again: then its folder is read"
            raise ConfigError("--data-dir", f"the running daemon gives no certificates ({error})", fix) from error
        return raw


@contextmanager
def open_certificates(data_dir: Path) -> Iterator[CertificateSource]:
    """Of a peer that runs or not. Raises StoreError, ConfigError, StatusError."""
    try:
        store = LedgerStore.open(data_dir / LEDGER_FILE)
    except StoreError as error:
        if error.failure is not Failure.STORE_IN_USE:
            raise
        yield AskedCertificates(*read_running(data_dir))
        return
    with store:
        yield StoredCertificates(store)
