"""The peer book under any sequence of events: bounded, ordered by its entries alone, and the same after a restart."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.dht import peer_book
from shoal.dht.peer_book import KnownPeer, PeerBook, Standing, decode_peer_book_untrusted
from shoal.protocol.identity import PeerId

ME = PeerId(bytes(32))
BOUND = 5

peers = st.integers(0, 11).map(lambda number: PeerId(number.to_bytes(32, "big")))
times = st.integers(0, 100)
places = st.integers(1, 3).map(lambda port: (f"/ip4/1.2.3.4/tcp/{port}",)) | st.just(())
hearsays = st.tuples(st.just("hear"), peers, places, times)
events = st.one_of(
    hearsays,
    st.tuples(st.just("success"), peers, places, times),
    st.tuples(st.just("failure"), peers, st.just(()), times),
    st.tuples(st.just("forget"), peers, st.just(()), times),
)
Event = tuple[str, PeerId, tuple[str, ...], int]


def play(book: PeerBook, history: list[Event]) -> None:
    calls: dict[str, Callable[[PeerId, tuple[str, ...], int], None]] = {
        "hear": book.hear,
        "success": book.note_success,
        "failure": lambda peer, _, now_s: book.note_failure(peer, now_s),
        "forget": lambda peer, _, now_s: book.forget(peer),
    }
    for kind, peer, addresses, now_s in history:
        calls[kind](peer, addresses, now_s)


@pytest.fixture(autouse=True, scope="module")
def small_book() -> object:
    patch = pytest.MonkeyPatch()
    patch.setattr(peer_book, "PEERS_MAX", BOUND)
    yield
    patch.undo()


@given(st.lists(events, max_size=60))
def test_it_is_bounded_and_ranked(history: list[Event]) -> None:
    book = PeerBook(ME)
    play(book, history)
    ranked = book.ranked()
    assert len(book) == len(ranked) <= BOUND
    assert ME not in [known.peer for known in ranked]
    standings = [known.standing for known in ranked]
    assert standings == sorted(standings)


@given(st.lists(events, max_size=40), st.randoms(use_true_random=False))
def test_the_order_depends_on_the_entries_alone(history: list[Event], shuffle: random.Random) -> None:
    book = PeerBook(ME)
    play(book, history)
    entries = list(book.ranked())
    shuffle.shuffle(entries)
    assert PeerBook(ME, entries).ranked() == book.ranked()


@given(st.lists(events, max_size=40))
def test_a_restart_changes_nothing(history: list[Event]) -> None:
    book = PeerBook(ME)
    play(book, history)
    assert decode_peer_book_untrusted(book.encode(), ME).ranked() == book.ranked()


@given(st.lists(hearsays, max_size=60))
def test_hearsay_leaves_measured_peers_alone(hearsay: list[Event]) -> None:
    measured = [
        KnownPeer(peer=PeerId(bytes([9]) * 31 + bytes([n])), addresses=(), heard_s=1, success_s=1) for n in b"ab"
    ]
    book = PeerBook(ME, measured)
    play(book, hearsay)
    assert [known.peer for known in book.ranked() if known.standing is Standing.MEASURED] == [m.peer for m in measured]


@given(st.lists(events, max_size=40), times, st.integers(0, 5))
def test_candidates_are_due_and_have_addresses(history: list[Event], now_s: int, count: int) -> None:
    book = PeerBook(ME)
    play(book, history)
    chosen = book.candidates(now_s, count)
    assert len(chosen) <= count
    for known in chosen:
        assert known.addresses and known.retry_at_s <= now_s
