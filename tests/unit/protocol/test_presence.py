"""Who is there: the newest word of every peer, and deadlines for those who fall silent."""

from dataclasses import replace

import pytest

from shoal.protocol import presence as module
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.messages import Presence, sign_message, sign_ready
from shoal.protocol.presence import PeerLost, PeerSeen, PresenceTable
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PEERS,
    SWARM,
    make_head,
    make_presence,
    make_ready,
)

TIMEOUT_S = 7.0
HEAD = make_head()


@pytest.fixture
def table() -> PresenceTable:
    return PresenceTable(PEERS[0], SWARM, TIMEOUT_S)


def refuse(table: PresenceTable, presence: Presence) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        table.receive(presence, 0.0)
    assert table.live() == {}, "a refused presence leaves no trace"
    assert table.newest(presence.peer) is None
    return caught.value


def test_a_forged_presence_is_refused(table: PresenceTable) -> None:
    good = make_presence(1)
    assert refuse(table, replace(good, tokens_per_s=2.0)).refusal is Refusal.BAD_SIGNATURE
    assert refuse(table, replace(good, peer=PEERS[2])).refusal is Refusal.BAD_SIGNATURE
    assert refuse(table, sign_message(IDENTITIES[1], OTHER_SWARM, good)).refusal is Refusal.BAD_SIGNATURE


def test_a_ready_of_somebody_else_is_refused(table: PresenceTable) -> None:
    assert refuse(table, make_presence(1, ready=make_ready(2, HEAD))).refusal is Refusal.WRONG_PEER


def test_a_ready_with_a_bad_signature_is_refused(table: PresenceTable) -> None:
    # It would make the proposer that plans with it look guilty.
    ready = make_ready(1, HEAD)
    for forged in (
        replace(ready, signature=bytes(64)),
        replace(ready, ready=replace(ready.ready, tokens=10**9)),
        sign_ready(IDENTITIES[1], OTHER_SWARM, ready.ready),
    ):
        error = refuse(table, make_presence(1, ready=forged))
        assert (error.refusal, error.detail[:5]) == (Refusal.BAD_SIGNATURE, "ready")
    assert table.receive(make_presence(1, ready=ready), 0.0) is not None


def test_the_newest_presence_wins(table: PresenceTable) -> None:
    first, second = make_presence(1, 1), make_presence(1, 2)
    restarted = make_presence(1, 1, incarnation=2)
    assert table.receive(second, 0.0) == PeerSeen(presence=second, first=True)
    assert table.receive(first, 1.0) is None
    assert table.receive(second, 1.0) is None
    assert table.receive(restarted, 1.0) == PeerSeen(presence=restarted, first=False)
    assert table.receive(make_presence(1, 9), 2.0) is None, "an earlier life is over"
    assert table.live() == {PEERS[1]: restarted}
    assert table.newest(PEERS[1]) == restarted


def test_old_words_do_not_keep_a_peer_alive(table: PresenceTable) -> None:
    presence = make_presence(1)
    table.receive(presence, 0.0)
    table.receive(presence, TIMEOUT_S - 1)
    assert table.next_deadline() == TIMEOUT_S
    assert table.handle_deadline(TIMEOUT_S) == [PeerLost(peer=PEERS[1], reason=Failure.PEER_LOST)]


def test_the_own_presence_is_no_news(table: PresenceTable) -> None:
    assert table.receive(make_presence(0), 0.0) is None
    assert table.next_deadline() is None


def test_a_silent_peer_is_lost_once(table: PresenceTable) -> None:
    table.receive(make_presence(1), 0.0)
    table.receive(make_presence(2), 1.0)
    assert table.handle_deadline(TIMEOUT_S - 0.001) == []
    assert [lost.peer for lost in table.handle_deadline(TIMEOUT_S)] == [PEERS[1]]
    assert table.handle_deadline(TIMEOUT_S) == []
    assert table.next_deadline() == TIMEOUT_S + 1.0
    assert list(table.live()) == [PEERS[2]]
    assert table.newest(PEERS[1]) is not None, "what was last heard of it is still known"


def test_a_lost_peer_comes_back_with_a_newer_word(table: PresenceTable) -> None:
    table.receive(make_presence(1, 1), 0.0)
    table.handle_deadline(TIMEOUT_S)
    assert table.receive(make_presence(1, 1), TIMEOUT_S) is None, "a replay does not raise the dead"
    seen = table.receive(make_presence(1, 2), TIMEOUT_S)
    assert seen is not None and seen.first


def test_an_expected_peer_that_never_speaks_is_lost(table: PresenceTable) -> None:
    table.expect((PEERS[0], PEERS[1], PEERS[2]), 1.0)
    assert table.live() == {}
    table.receive(make_presence(1), 2.0)
    unseen = PeerLost(peer=PEERS[2], reason=Failure.PEER_UNSEEN)
    assert table.handle_deadline(1.0 + TIMEOUT_S) == [unseen], "nobody knows whether it was ever there"
    table.expect((PEERS[1],), 3.0)
    assert table.next_deadline() == 2.0 + TIMEOUT_S, "an expectation is no sign of life"


def test_a_peer_that_was_lost_is_not_expected_again(table: PresenceTable) -> None:
    table.receive(make_presence(1), 0.0)
    table.handle_deadline(TIMEOUT_S)
    table.expect((PEERS[1],), TIMEOUT_S)
    assert table.next_deadline() is None


def test_a_broken_connection_loses_a_live_peer_once(table: PresenceTable) -> None:
    table.receive(make_presence(1), 0.0)
    assert table.suspect(PEERS[1], 1.0) == PeerLost(peer=PEERS[1], reason=Failure.PEER_LOST)
    assert table.suspect(PEERS[1], 1.0) is None
    assert table.suspect(PEERS[2], 1.0) is None, "a stranger cannot be lost"


def test_the_farewell_of_a_peer_that_is_expected_is_its_first_word(table: PresenceTable) -> None:
    """A voter that leaves still votes until it has gone; who is listed as alive has been told of."""
    table.expect((PEERS[1], PEERS[2]), 0.0)
    seen = table.receive(make_presence(1, 2, leaving=True), 1.0)
    assert seen is not None and seen.first
    assert set(table.live()) == {PEERS[1]}
    assert [lost.peer for lost in table.handle_deadline(1.0 + TIMEOUT_S)] == [PEERS[1], PEERS[2]]
    assert table.receive(make_presence(1, 3, leaving=True), 2.0 + TIMEOUT_S) is None
    assert table.live() == {}


def test_a_farewell_does_not_bring_a_peer_back(table: PresenceTable) -> None:
    table.receive(make_presence(1, 1), 0.0)
    table.suspect(PEERS[1], 1.0)
    assert table.receive(make_presence(1, 2, leaving=True), 2.0) is None
    assert table.live() == {}
    assert table.receive(make_presence(1, 1), 2.0) is None, "what came before the farewell is old"


def test_a_live_peer_that_leaves_stays_until_it_is_gone(table: PresenceTable) -> None:
    table.receive(make_presence(1, 1), 0.0)
    seen = table.receive(make_presence(1, 2, leaving=True), 1.0)
    assert seen is not None and not seen.first
    assert table.live()[PEERS[1]].leaving


def test_live_peers_are_listed_in_the_order_of_their_ids(table: PresenceTable) -> None:
    for number in (3, 1, 2):
        table.receive(make_presence(number), 0.0)
    assert list(table.live()) == list(PEERS[1:4])


def test_a_full_table_forgets_the_dead_and_refuses_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PEERS_MAX", 2)
    table = PresenceTable(PEERS[0], SWARM, TIMEOUT_S)
    table.receive(make_presence(1), 0.0)
    table.receive(make_presence(2), 0.0)
    with pytest.raises(ProtocolError) as caught:
        table.receive(make_presence(3), 0.0)
    assert caught.value.refusal is Refusal.LIMIT
    assert table.receive(make_presence(1, 2), 0.0) is not None, "who is known is heard"
    table.suspect(PEERS[2], 1.0)
    assert table.receive(make_presence(3), 1.0) is not None
    assert table.newest(PEERS[2]) is None
    assert list(table.live()) == [PEERS[1], PEERS[3]]
