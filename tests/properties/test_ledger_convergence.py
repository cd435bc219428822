"""Replicas that hear of the same entries hold the same ledger and fold it to the same bytes: the laws of a join.

Commutative, associative, idempotent, over random histories, compared with a model (`ledger_model.py`) that computes the
state from the bare set of entries in one go. What networks, crashes and liars make of it: `test_ledger_machine.py`.
SHOAL_NIGHTLY=1 runs many times the examples.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.crdt.entries import (
    Batch,
)
from shoal.crdt.ledger import Draft, Ledger
from shoal.protocol.identity import Identity
from tests.properties.ledger_drafts import (
    END_MS,
    HOUR_MS,
    NIGHTLY,
    START_MS,
    assert_folds_like_the_model_at_any_time,
    draft_certificate,
    owners_drafts,
    peers_drafts,
)
from tests.properties.ledger_model import (
    HONEST,
    LIARS,
    ROUNDS_PER_ERA,
    RULES,
    list_entries,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One writer, having taken in all of another's ledger or not, writes; `wall_ms` is its clock. `rounds`: it enters
    so many certificates as well."""

    writer: int
    source: int | None
    drafts: list[Draft]
    wall_ms: int
    rounds: int


# The last two writers share an identity and so equivocate as soon as both have written.
WRITERS = [*HONEST, LIARS[0], LIARS[1], LIARS[1]]


def build_steps(writers: st.SearchStrategy[int], drafts: st.SearchStrategy[Draft]) -> st.SearchStrategy[Step]:
    return st.builds(
        Step,
        writer=writers,
        source=st.none() | st.integers(0, len(WRITERS) - 1),
        drafts=st.lists(drafts, min_size=1, max_size=3),
        wall_ms=st.integers(START_MS - HOUR_MS, START_MS + 2 * HOUR_MS),
        rounds=st.integers(0, 2),
    )


steps = st.lists(
    build_steps(st.integers(0, len(WRITERS) - 1), peers_drafts) | build_steps(st.just(0), owners_drafts),
    min_size=1,
    max_size=12,
)


def write_history(history: list[Step]) -> list[Batch]:
    writers = [Ledger(identity=identity, rules=RULES) for identity in WRITERS]
    batches = []
    for step in history:
        writer = writers[step.writer]
        if step.source is not None:
            merge_into(writer, writers[step.source])
        if WRITERS[step.writer].peer not in writer.forks:
            batches.append(writer.write(step.drafts, step.wall_ms))
            writer.accept(batches[-1])
            # No further than into the second era, so that nothing is too far ahead for anybody.
            for _ in range(step.rounds):
                head = writer.fold(END_MS).verdicts.head.round
                if head < 2 * ROUNDS_PER_ERA:
                    batches.append(writer.write([draft_certificate(head + 1)], step.wall_ms))
                    writer.accept(batches[-1])
    return batches


def make_replica(batches: Iterable[Batch]) -> Ledger:
    replica = Ledger(identity=Identity(b"r" * 32), rules=RULES)
    for batch in batches:
        replica.accept(batch)
    return replica


def merge_into(target: Ledger, source: Ledger) -> Ledger:
    for entry_id in list_entries(source):
        target.accept(source.prove(entry_id))
    return target


@settings(max_examples=2000 if NIGHTLY else 60, deadline=None)
@given(history=steps, data=st.data())
def test_the_ledger_is_a_join(history: list[Step], data: st.DataObject) -> None:
    batches = write_history(history)
    choices = [data.draw(st.lists(st.sampled_from(batches))) for _ in range(3)]

    def replica(number: int) -> Ledger:
        # Made twice to leave behind what waits for something that was not chosen: it is not in the ledger.
        return merge_into(make_replica([]), make_replica(choices[number]))

    left = merge_into(merge_into(replica(0), replica(1)), replica(2))
    right = merge_into(replica(0), merge_into(replica(1), replica(2)))
    swapped = merge_into(merge_into(replica(2), replica(1)), replica(0))
    again = merge_into(merge_into(left, left), replica(1))
    assert list_entries(left) == list_entries(right) == list_entries(swapped) == list_entries(again)
    for ledger in (left, right, swapped, again):
        assert_folds_like_the_model_at_any_time(ledger)


@settings(max_examples=2000 if NIGHTLY else 60, deadline=None)
@given(history=steps, data=st.data())
def test_the_order_of_arrival_does_not_matter(history: list[Step], data: st.DataObject) -> None:
    batches = write_history(history)
    replica = make_replica(data.draw(st.permutations(batches + batches)))
    assert set(list_entries(replica)) == {entry_id for batch in batches for entry_id in batch.ids}
    assert replica.list_wanted() == ()
    assert_folds_like_the_model_at_any_time(replica)
