"""What members say that they have measured: by whom the round names, one a round, bounded whatever others write."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.crdt import measurements
from shoal.crdt.certified import Credit
from shoal.crdt.fold import LedgerState, Verdicts
from shoal.crdt.kinds import EntryId, TagBody, decode_body_untrusted, encode_body
from shoal.crdt.measurements import (
    HELD_OUT_TAG,
    MEASUREMENT_BYTES_MAX,
    MEASUREMENTS_KEPT_MAX,
    MEASUREMENTS_SHOWN_MAX,
    ROUNDS_READ_MAX,
    TAGS_READ_MAX,
    HeldOutLoss,
    decode_measurement_untrusted,
    draft_measurement,
    is_sayable,
    list_measurements,
)
from shoal.crdt.merge import Tag
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate
from shoal.protocol.quorum import find_evaluator
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import make_log
from tests.unit.protocol.samples import IDENTITIES, PEERS, SWARM

EVERY = 2
LOG = make_log(SWARM, IDENTITIES[:3], 3 * ROUNDS_READ_MAX)
STRANGER = PEERS[4]


def evaluator_of(number: int) -> PeerId:
    found = find_evaluator(LOG[number - 1].result, EVERY)
    assert found is not None
    return found


def make_tag(author: PeerId, value: bytes, number: int = 0, name: str = HELD_OUT_TAG) -> Tag:
    return Tag(name=name, value=value, author=author, entry=EntryId(number.to_bytes(32, "big")))


def say(number: int, loss: float = 3.0, author: PeerId | None = None, entry: int | None = None) -> Tag:
    """A tag as its author writes it, by default whom the round names."""
    value = encode_record(HeldOutLoss(round=number, loss_nats=loss, tokens=64))
    return make_tag(evaluator_of(number) if author is None else author, value, number if entry is None else entry)


def make_state(*tags: Tag, log: list[Certificate] = LOG) -> LedgerState:
    verdicts = Verdicts(
        certificates={one.result.round: encode_record(one) for one in log},
        credit=dict.fromkeys(PEERS[:3], Credit(tokens=1, rounds=1)),
    )
    ordered = tuple(sorted(tags, key=lambda tag: (tag.name, tag.entry)))
    return LedgerState(
        leases={}, addresses={}, snapshots={}, tags=ordered, manifest=None, reroot=None, verdicts=verdicts
    )


def rounds_of(state: LedgerState) -> list[int]:
    return [one.held_out.round for one in list_measurements(state, EVERY)]


def test_the_newest_come_first_with_who_measured_them() -> None:
    found = list_measurements(make_state(say(2, 4.5), say(6, 2.5), say(4, 3.5)), EVERY)
    assert [(one.author, one.held_out.round, one.held_out.loss_nats) for one in found] == [
        (evaluator_of(6), 6, 2.5),
        (evaluator_of(4), 4, 3.5),
        (evaluator_of(2), 2, 4.5),
    ]
    assert len({evaluator_of(number) for number in range(2, 20, 2)}) == 3, "it is not always the same one"


def test_only_whom_the_round_names_is_heard() -> None:
    others = [peer for peer in PEERS[:3] if peer != evaluator_of(4)]
    lies = [say(4, 0.1, author=other, entry=50 + at) for at, other in enumerate([*others, STRANGER])]
    assert rounds_of(make_state(*lies)) == []
    (found,) = list_measurements(make_state(say(4, 3.0), *lies), EVERY)
    assert (found.author, found.held_out.loss_nats) == (evaluator_of(4), 3.0)


def test_a_round_that_is_not_certified_or_not_measured_is_not_shown() -> None:
    future = make_tag(PEERS[0], encode_record(HeldOutLoss(round=2**62, loss_nats=0.0, tokens=1)))
    odd = [say(3, author=peer, entry=30 + at) for at, peer in enumerate(PEERS[:3])]
    assert rounds_of(make_state(future, *odd, say(4))) == [4]
    assert rounds_of(make_state(say(4), log=LOG[:3])) == [], "its certificate is not there yet"
    assert list_measurements(make_state(say(4)), 0) == (), "nobody measures"


def test_a_round_that_nobody_contributed_to_has_no_evaluator() -> None:
    result = dataclasses.replace(LOG[3].result, members=(), parts=())
    assert find_evaluator(result, 4) is None
    assert find_evaluator(LOG[3].result, 0) is None and find_evaluator(LOG[3].result, 3) is None


def test_who_says_two_things_of_a_round_is_heard_once_and_everywhere_alike() -> None:
    one, two = say(4, 3.0, entry=7), say(4, 2.0, entry=9)
    for tags in ((one, two), (two, one)):
        (found,) = list_measurements(make_state(*tags), EVERY)
        assert found.held_out.loss_nats == 2.0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1.1e6, -1.1e6])
def test_a_loss_out_of_range_is_neither_written_nor_read(loss: float) -> None:
    held_out = HeldOutLoss(round=4, loss_nats=loss, tokens=64)
    assert not is_sayable(held_out)
    assert rounds_of(make_state(make_tag(evaluator_of(4), encode_record(held_out)), say(6))) == [6]


def test_figures_of_nothing_are_not_written() -> None:
    assert is_sayable(HeldOutLoss(round=1, loss_nats=-3.0, tokens=1))
    assert not is_sayable(HeldOutLoss(round=0, loss_nats=1.0, tokens=1))
    assert not is_sayable(HeldOutLoss(round=1, loss_nats=1.0, tokens=0))


def test_the_largest_measurement_fits() -> None:
    largest = encode_record(HeldOutLoss(round=2**63 - 1, loss_nats=1e6, tokens=2**63 - 1))
    assert decode_measurement_untrusted(largest).tokens == 2**63 - 1
    with pytest.raises(ProtocolError):
        decode_measurement_untrusted(largest + bytes(MEASUREMENT_BYTES_MAX))


@given(st.lists(st.tuples(st.sampled_from(PEERS), st.binary(max_size=80)), max_size=20))
def test_whatever_others_write_nothing_is_raised_and_an_honest_one_is_heard(
    written: list[tuple[PeerId, bytes]],
) -> None:
    spam = [make_tag(author, value, 1000 + at) for at, (author, value) in enumerate(written)]
    assert rounds_of(make_state(say(8), *spam)) == [8]


def test_no_more_is_shown_than_fits_and_no_more_is_read() -> None:
    numbers = range(EVERY, EVERY * (MEASUREMENTS_SHOWN_MAX + 4) + 1, EVERY)
    assert (
        rounds_of(make_state(*(say(number) for number in numbers))) == list(numbers)[: -MEASUREMENTS_SHOWN_MAX - 1 : -1]
    )


def test_tags_for_measured_rounds_by_others_cost_a_bounded_number_of_certificates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []

    def find(certificate: bytes, evaluate_every: int) -> PeerId | None:
        read.append(len(certificate))
        return None

    monkeypatch.setattr(measurements, "_find_evaluator", find)
    spam = [say(number, author=PEERS[number // 2 % 3]) for number in range(2, len(LOG), 2)]
    assert list_measurements(make_state(*spam), EVERY) == ()
    assert len(read) == ROUNDS_READ_MAX


def test_of_an_author_a_bounded_number_of_tags_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def decode(value: bytes) -> HeldOutLoss:
        read.append(value)
        return decode_measurement_untrusted(value)

    monkeypatch.setattr(measurements, "decode_measurement_untrusted", decode)
    spammer = next(peer for peer in PEERS[:3] if peer != evaluator_of(8))
    spam = [make_tag(spammer, b"x", 100 + at) for at in range(5 * TAGS_READ_MAX)]
    strangers = [make_tag(STRANGER, b"x", 900 + at) for at in range(9)]
    assert rounds_of(make_state(*spam, *strangers, say(8, entry=5000))) == [8]
    assert len(read) == TAGS_READ_MAX + 1, "of who was in no round, none"


def test_an_author_takes_back_its_oldest_and_what_it_said_of_the_same_round() -> None:
    me = evaluator_of(4)
    own = [say(number, author=me, entry=200 - number) for number in range(2, 2 + 2 * MEASUREMENTS_KEPT_MAX, 2)]
    newest = HeldOutLoss(round=100, loss_nats=1.0, tokens=64)
    added, removed = (draft.body for draft in draft_measurement(make_state(*own), me, newest))
    assert isinstance(added, TagBody) and decode_measurement_untrusted(added.value) == newest
    assert isinstance(removed, TagBody) and removed.removes == (own[0].entry,), "the oldest round, not the lowest id"
    again = HeldOutLoss(round=8, loss_nats=1.0, tokens=64)
    _, removed = (draft.body for draft in draft_measurement(make_state(*own), me, again))
    assert isinstance(removed, TagBody) and removed.removes == (own[3].entry,)
    (only,) = draft_measurement(make_state(*own[:3]), me, newest)
    assert isinstance(only.body, TagBody) and only.body.name == HELD_OUT_TAG
    foreign = make_state(*(dataclasses.replace(tag, author=STRANGER) for tag in own))
    assert len(draft_measurement(foreign, me, newest)) == 1, "what others say is theirs"


def test_what_is_written_is_a_body_that_every_replica_takes() -> None:
    me = evaluator_of(4)
    own = [make_tag(me, say(2).value, at) for at in range(TAGS_READ_MAX + 9)]
    for draft in draft_measurement(make_state(*own), me, HeldOutLoss(round=4, loss_nats=1.0, tokens=64)):
        assert decode_body_untrusted(draft.kind, encode_body(draft.body)) == draft.body
