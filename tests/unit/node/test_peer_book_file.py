"""The peer book on disk: it comes back as it was, and neither damage nor a full disk stops a peer."""

import os
from pathlib import Path

import pytest

from shoal.dht.peer_book import PeerBook
from shoal.node.peer_book_file import load_peer_book, save_peer_book
from tests.unit.protocol.samples import PEERS

ME, ANN, BOB = PEERS[:3]
NOW_S = 1_760_000_000.0


def make_book() -> PeerBook:
    book = PeerBook(ME)
    for number, peer in enumerate((ANN, BOB)):
        book.hear(peer, (f"/ip4/203.0.113.{number + 1}/tcp/9460",), NOW_S)
    book.note_success(ANN, (), NOW_S)
    return book


def test_a_book_comes_back_as_it_was(tmp_path: Path) -> None:
    path, book = tmp_path / "peers.book", make_book()
    save_peer_book(path, book.encode())
    loaded = load_peer_book(path, ME)
    assert loaded.get(ANN) == book.get(ANN) and loaded.get(BOB) == book.get(BOB)
    assert [one.peer for one in loaded.candidates(NOW_S + 3600, 8, set())] != []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["peers.book"]


def test_no_book_is_an_empty_one(tmp_path: Path) -> None:
    assert load_peer_book(tmp_path / "peers.book", ME).get(ANN) is None


@pytest.mark.parametrize("cut", [0, 1, 7, -1])
def test_a_torn_book_is_begun_anew_and_that_is_told(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers.book"
    path.write_bytes(make_book().encode()[:cut])
    assert load_peer_book(path, ME).get(ANN) is None
    assert "is damaged and is begun anew" in caplog.text
    save_peer_book(path, make_book().encode())
    assert load_peer_book(path, ME).get(ANN) is not None


def test_a_book_that_cannot_be_read_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers.book"
    path.mkdir()
    assert load_peer_book(path, ME).get(ANN) is None
    assert "cannot be read" in caplog.text


def test_a_write_that_was_cut_off_leaves_the_old_book(tmp_path: Path) -> None:
    path = tmp_path / "peers.book"
    save_peer_book(path, make_book().encode())
    path.with_suffix(".partial").write_bytes(b"half of ano")
    assert load_peer_book(path, ME).get(ANN) is not None
    save_peer_book(path, PeerBook(ME).encode())
    assert load_peer_book(path, ME).get(ANN) is None
    assert not path.with_suffix(".partial").exists()


def test_a_full_disk_costs_the_book_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.book"
    save_peer_book(path, make_book().encode())

    def fail(self: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", fail)
    save_peer_book(path, PeerBook(ME).encode())
    assert "No space left on device" in caplog.text
    assert load_peer_book(path, ME).get(ANN) is not None, "the old one is still there"
