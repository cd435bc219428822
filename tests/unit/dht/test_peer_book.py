"""The peer book: what is kept, in which order, and what comes back from disk."""

import pytest

from shoal.dht.peer_book import (
    FAILURES_MAX,
    PEERS_MAX,
    RETRY_MAX_S,
    RETRY_MIN_S,
    KnownPeer,
    PeerBook,
    Standing,
    decode_peer_book_untrusted,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId

ME = PeerId(bytes(32))
HERE = ("/ip4/203.0.113.5/tcp/4001",)
THERE = ("/ip4/203.0.113.6/tcp/4001",)


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def order(book: PeerBook) -> list[int]:
    return [int.from_bytes(known.peer, "big") for known in book.ranked()]


def test_measured_before_unmeasured_before_failed() -> None:
    book = PeerBook(ME)
    for number in (1, 2, 3, 4):
        book.hear(peer(number), HERE, now_s=100)
    book.note_success(peer(3), (), now_s=110)
    book.note_failure(peer(1), now_s=120)
    assert order(book) == [3, 2, 4, 1]
    assert [known.standing for known in book.ranked()] == [
        Standing.MEASURED,
        Standing.UNMEASURED,
        Standing.UNMEASURED,
        Standing.FAILED,
    ]


def test_the_latest_success_comes_first_and_the_fewest_failures_before_more() -> None:
    book = PeerBook(ME)
    for number in (1, 2, 3, 4):
        book.note_success(peer(number), HERE, now_s=100 + number)
    for _ in range(2):
        book.note_failure(peer(4), now_s=200)
    book.note_failure(peer(3), now_s=300)
    assert order(book) == [2, 1, 3, 4]


def test_a_success_forgives_every_failure() -> None:
    book = PeerBook(ME)
    book.hear(peer(1), HERE, now_s=1)
    book.note_failure(peer(1), now_s=2)
    book.note_success(peer(1), (), now_s=3)
    known = book.get(peer(1))
    assert known is not None and known.standing is Standing.MEASURED and known.addresses == HERE


def test_a_failed_peer_is_left_alone_for_longer_and_longer() -> None:
    book = PeerBook(ME)
    book.hear(peer(1), HERE, now_s=0)
    pauses = []
    for _ in range(FAILURES_MAX):
        book.note_failure(peer(1), now_s=1000)
        known = book.get(peer(1))
        assert known is not None
        pauses.append(known.retry_at_s - 1000)
        assert book.candidates(known.retry_at_s - 1, 9) == ()
        assert book.candidates(known.retry_at_s, 9) == (known,)
    assert pauses[:3] == [RETRY_MIN_S, 2 * RETRY_MIN_S, 4 * RETRY_MIN_S]
    assert pauses[-1] == RETRY_MAX_S and pauses == sorted(pauses)
    book.note_failure(peer(1), now_s=2000)
    assert book.get(peer(1)) is None


def test_candidates_are_the_best_that_are_due_and_not_excluded() -> None:
    book = PeerBook(ME)
    for number in range(1, 6):
        book.note_success(peer(number), HERE, now_s=100 - number)
    book.note_success(peer(9), (), now_s=500)
    assert [known.peer for known in book.candidates(1000, 2, exclude=[peer(1)])] == [peer(2), peer(3)]
    assert peer(9) not in [known.peer for known in book.candidates(1000, 9)]


def test_addresses_that_work_are_not_replaced_by_hearsay() -> None:
    book = PeerBook(ME)
    book.note_success(peer(1), HERE, now_s=1)
    book.hear(peer(1), THERE, now_s=2)
    assert [known.addresses for known in book.ranked()] == [HERE]
    book.note_failure(peer(1), now_s=3)
    book.hear(peer(1), THERE, now_s=4)
    assert [known.addresses for known in book.ranked()] == [THERE]
    book.hear(peer(1), (), now_s=5)
    assert [known.addresses for known in book.ranked()] == [THERE]
    book.note_success(peer(1), HERE, now_s=6)
    assert [known.addresses for known in book.ranked()] == [HERE]


def test_hearsay_never_pushes_out_a_measured_peer() -> None:
    book = PeerBook(ME)
    measured = [peer(number) for number in range(1, 11)]
    for known in measured:
        book.note_success(known, HERE, now_s=1)
    for number in range(1000, 1000 + 2 * PEERS_MAX):
        book.hear(peer(number), THERE, now_s=10_000 + number)
    assert len(book) == PEERS_MAX
    assert [known.peer for known in book.ranked()[:10]] == measured


def test_a_node_does_not_keep_itself() -> None:
    book = PeerBook(ME)
    book.hear(ME, HERE, now_s=1)
    book.note_success(ME, HERE, now_s=1)
    assert len(book) == 0


def test_a_forgotten_peer_is_gone_and_failures_of_strangers_are_nothing() -> None:
    book = PeerBook(ME)
    book.hear(peer(1), HERE, now_s=1)
    book.forget(peer(1))
    book.forget(peer(1))
    book.note_failure(peer(1), now_s=2)
    assert len(book) == 0


def test_the_book_comes_back_from_its_bytes() -> None:
    book = PeerBook(ME)
    book.note_success(peer(1), HERE, now_s=5)
    book.hear(peer(2), THERE, now_s=6)
    book.note_failure(peer(2), now_s=7)
    again = decode_peer_book_untrusted(book.encode(), ME)
    assert again.ranked() == book.ranked()
    assert again.encode() == book.encode()


def test_a_full_book_comes_back() -> None:
    addresses = tuple(f"/dns4/{'a' * 60}.{'b' * 60}.{'c' * 60}.example/tcp/{port}" for port in range(1, 9))
    book = PeerBook(ME, (KnownPeer(peer=peer(n), addresses=addresses, heard_s=n) for n in range(1, PEERS_MAX + 10)))
    assert len(book) == PEERS_MAX
    assert decode_peer_book_untrusted(book.encode(), ME).ranked() == book.ranked()


def test_a_book_of_another_version_or_with_a_bad_address_is_refused() -> None:
    raw = PeerBook(ME).encode()
    assert raw[:2] == b"\x92\x01"
    with pytest.raises(ProtocolError) as caught:
        decode_peer_book_untrusted(b"\x92\x02" + raw[2:], ME)
    assert caught.value.refusal is Refusal.WRONG_VERSION
    bad = PeerBook(ME, [KnownPeer(peer=peer(1), addresses=("nonsense",), heard_s=1)]).encode()
    with pytest.raises(ProtocolError) as caught:
        decode_peer_book_untrusted(bad, ME)
    assert caught.value.refusal is Refusal.MALFORMED


def test_a_peer_that_dialled_us_is_known_by_the_addresses_that_it_says_later() -> None:
    book = PeerBook(ME)
    book.note_success(peer(1), (), 10.0)
    book.hear(peer(1), HERE, 11.0)
    book.hear(peer(1), THERE, 12.0)
    known = book.get(peer(1))
    assert known is not None and known.addresses == HERE and known.standing is Standing.MEASURED
