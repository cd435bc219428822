import pytest

from shoal.crdt.clock import hlc_at
from shoal.crdt.own_chain import CONFIRMATIONS_WANTED, PATIENCE_S, SKEW_MS, SPREAD_S, OwnChain
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId

PEERS = [PeerId(bytes([number]) * 32) for number in range(8)]
START_MS = 1_700_000_000_000


def make_own_chain(spread_s: float = 2.0) -> OwnChain:
    return OwnChain(started_ms=START_MS, spread_s=spread_s)


def test_a_peer_that_sees_nobody_writes_nothing() -> None:
    assert make_own_chain().held is Failure.CHAIN_UNCONFIRMED


def test_a_few_peers_are_asked_and_one_of_them_again_after_the_delay() -> None:
    own = make_own_chain()
    for at, peer in enumerate(PEERS[:CONFIRMATIONS_WANTED]):
        own.confirm(peer, float(at))
    last = CONFIRMATIONS_WANTED - 1
    own.confirm(PEERS[0], last + 1.9)
    assert own.held is Failure.CHAIN_UNCONFIRMED
    own.confirm(PEERS[0], last + 2.0)
    assert own.held is None


def test_one_peer_asked_twice_is_one_peer() -> None:
    own = make_own_chain(spread_s=0.0)
    for at in range(4):
        own.confirm(PEERS[0], float(at))
    assert own.held is Failure.CHAIN_UNCONFIRMED


def test_peers_that_never_answer_are_waited_for_no_longer_than_patience() -> None:
    own = make_own_chain(spread_s=0.0)
    own.confirm(PEERS[0], 3.0)
    own.confirm(PEERS[0], 3.0 + PATIENCE_S)
    assert own.held is Failure.CHAIN_UNCONFIRMED
    own.confirm(PEERS[0], 3.0 + PATIENCE_S)
    assert own.held is None


@pytest.mark.parametrize("is_open", [False, True])
def test_an_own_entry_that_is_younger_than_this_process_is_a_clones(is_open: bool) -> None:
    own = make_own_chain(spread_s=0.0)
    if is_open:
        for at in range(3):
            own.confirm(PEERS[0], at * PATIENCE_S)
    assert not own.meet(hlc_at(START_MS - 1)), "of this peer before it was started again"
    assert not own.meet(hlc_at(START_MS + SKEW_MS)), "a clock may differ a little"
    held = [own.held]
    assert own.meet(hlc_at(START_MS + SKEW_MS + 1))
    held.append(own.held)
    own.confirm(PEERS[0], 99.0)
    held.append(own.held)
    # There is no way back but to stop one of them.
    assert held == [None if is_open else Failure.CHAIN_UNCONFIRMED, Failure.CHAIN_CLONED, Failure.CHAIN_CLONED]


def test_the_delay_is_bounded() -> None:
    with pytest.raises(AssertionError):
        make_own_chain(spread_s=SPREAD_S + 1)


@pytest.mark.parametrize(
    ("incarnation", "sent_at_s", "is_cloned"),
    [
        (100, 500.0, False),  # its own
        (90, 100.9, False),  # of the process before, killed within the same second
        (90, 101.1, True),
        (130, 131.0, True),
        (130, 95.0, False),  # of a time when the clock was wrong
    ],
)
def test_a_presence_that_was_sent_since_the_start_by_another_process_is_a_clones(
    incarnation: int, sent_at_s: float, is_cloned: bool
) -> None:
    own = make_own_chain()
    assert own.meet_presence(incarnation, sent_at_s, 100) is is_cloned
    assert (own.held is Failure.CHAIN_CLONED) is is_cloned
