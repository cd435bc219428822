import random

import pytest

from shoal.crdt.anti_entropy import COMPARISONS_MAX, PUSH_PEERS, ROUND_TRIPS_MAX, Conversation, PeerChoice
from shoal.crdt.entries import Batch, decode_batch_untrusted
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId

NOW_MS = 1_700_000_000_000
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)
PEERS = [PeerId(bytes([number]) * 32) for number in range(20)]


def make_ledger(batches: list[Batch]) -> Ledger:
    ledger = Ledger(identity=Identity(bytes(32)), rules=RULES)
    ledger.restore(batches)
    return ledger


def write_many(count: int, body_bytes: int = 8) -> list[Batch]:
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(body_bytes)))]
    identities = (Identity((number + 1).to_bytes(32, "big")) for number in range(count))
    return [Ledger(identity=one, rules=RULES).write(drafts, NOW_MS + at) for at, one in enumerate(identities)]


def take(ledger: Ledger, batches: tuple[bytes, ...]) -> None:
    for raw in batches:
        ledger.accept(decode_batch_untrusted(raw))


def converse(opener: Ledger, other: Ledger, salt: bytes = bytes(SALT_BYTES)) -> Conversation:
    conversation = Conversation(opener, salt)
    while conversation.request is not None:
        reply = answer(other, conversation.request)
        take(opener, reply.batches)
        take(other, conversation.go_on(reply.reply or b"", len(reply.batches)))
    return conversation


def test_peers_are_chosen_by_chance_and_none_twice() -> None:
    choice = PeerChoice(random.Random(1).randbytes)
    pushed = [choice.choose_for_push(PEERS) for _ in range(200)]
    compared = [choice.choose_for_comparison(PEERS) for _ in range(200)]
    assert {len(set(chosen)) for chosen in pushed} == {PUSH_PEERS}
    assert {len(set(chosen)) for chosen in compared} == {COMPARISONS_MAX}
    assert {peer for chosen in pushed for peer in chosen} == {chosen[0] for chosen in compared} == set(PEERS)


def test_few_peers_are_all_chosen_and_none_is_no_choice() -> None:
    choice = PeerChoice(random.Random(1).randbytes)
    assert set(choice.choose_for_push(PEERS[:2])) == set(PEERS[:2])
    assert choice.choose_for_push([]) == choice.choose_for_comparison([]) == ()


def test_every_conversation_has_a_salt_of_its_own() -> None:
    choice = PeerChoice(random.Random(1).randbytes)
    salts = {choice.draw_salt() for _ in range(100)}
    assert len(salts) == 100
    assert {len(salt) for salt in salts} == {SALT_BYTES}


def test_equal_ledgers_find_no_difference() -> None:
    batches = write_many(50)
    assert not converse(make_ledger(batches), make_ledger(batches)).found_difference


@pytest.mark.parametrize(
    ("opener", "other"), [((0, 40), (0, 50)), ((0, 50), (0, 40)), ((0, 1), (0, 0)), ((0, 0), (0, 1))]
)
def test_what_either_side_lacks_is_found(opener: tuple[int, int], other: tuple[int, int]) -> None:
    batches = write_many(50)
    left, right = make_ledger(batches[slice(*opener)]), make_ledger(batches[slice(*other)])
    assert converse(left, right).found_difference
    assert len(left) == len(right) == max(opener[1], other[1])
    assert not converse(left, right).found_difference


def test_a_conversation_ends_after_so_many_round_trips_and_goes_on_in_the_next() -> None:
    batches = write_many(50 * ROUND_TRIPS_MAX, body_bytes=1000)
    holder, newcomer = make_ledger(batches), make_ledger([])
    conversation, asked = Conversation(newcomer, bytes(SALT_BYTES)), 0
    while conversation.request is not None:
        asked += 1
        # The other side answers with too little each time.
        reply = answer(holder, conversation.request)
        take(newcomer, reply.batches[:5])
        conversation.go_on(reply.reply or begin(holder, bytes(SALT_BYTES)), 5)
    assert asked == ROUND_TRIPS_MAX
    while converse(newcomer, holder).found_difference:
        pass
    assert len(newcomer) == len(batches)


def test_a_reply_that_no_honest_peer_sends_ends_it() -> None:
    conversation = Conversation(make_ledger(write_many(3)), bytes(SALT_BYTES))
    with pytest.raises(ProtocolError):
        conversation.go_on(b"no message", 0)
    assert conversation.request is None
