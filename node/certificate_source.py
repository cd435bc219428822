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
from shoal.protocol.messages import Certificate, CertificatesAnswer
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

LEDGER_FILE = "ledger.sqlite"
ASK_TIMEOUT_S = 10.0
PAGES_KEPT = 2  # of certificates that a daemon has sent: whoever goes through a log looks at a round and its neighbours


class CertificateSource(Protocol):
    """The certified rounds that one peer knows."""

    @property
    def newest(self) -> int:
        """The newest round that there is a certificate of; 0 before the first."""
        ...

    @property
    def own_root(self) -> tuple[int, bytes] | None:
        """The round that a running daemon stands at and its state root there."""
        ...

    def get(self, number: int) -> Certificate | None:
        """The certificate of a round. Raises ProtocolError where its bytes are damaged, ConfigError where the daemon
        does not answer."""
        ...


class StoredCertificates:
    """Of a peer that does not run."""

    own_root = None

    def __init__(self, store: LedgerStore) -> None:
        self._store = store
        last = store.get_last_certificate()
        self.newest = 0 if last is None else last.round

    def get(self, number: int) -> Certificate | None:
        stored = self._store.get_certificate(number)
        return None if stored is None else decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)


class AskedCertificates:
    """Of a peer that runs, through its web port."""

    def __init__(self, host: str, port: int) -> None:
        status = fetch_status(host, port)
        self.newest = status.round.round - 1
        self.own_root = (self.newest, bytes.fromhex(status.round.state_root))
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}/certificates"
        self._pages: dict[int, tuple[Certificate, ...]] = {}

    def get(self, number: int) -> Certificate | None:
        for first, page in self._pages.items():
            if first <= number < first + len(page):
                return page[number - first]
        page = self._ask(number)
        self._pages[number] = page
        while len(self._pages) > PAGES_KEPT:
            del self._pages[next(iter(self._pages))]
        return page[0] if page else None

    def _ask(self, first: int) -> tuple[Certificate, ...]:
        try:
            with urllib.request.urlopen(f"{self._url}?first={first}", timeout=ASK_TIMEOUT_S) as answer:
                raw = answer.read(DELTA_BYTES_MAX + 1)
        except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
            fix = "stop it and try again: then its folder is read"
            raise ConfigError("--data-dir", f"the running daemon gives no certificates ({error})", fix) from error
        page = decode_record_untrusted(CertificatesAnswer, raw, DELTA_BYTES_MAX).certificates
        if any(one.result.round != first + at for at, one in enumerate(page)):
            raise ProtocolError(Refusal.WRONG_ROUND, f"not the certificates from round {first} on")
        return page


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
