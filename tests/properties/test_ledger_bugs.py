"""The random machine must bite: each of these bugs, put into the code under test, is found by it."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from shoal.crdt import certified, ledger
from shoal.crdt.certified import CertifiedChain
from shoal.crdt.entries import Batch, Entry
from shoal.crdt.evidence import EvidenceShelf, slot_of
from shoal.crdt.kinds import AdmissionBody, Decree, EntryId
from shoal.crdt.ledger import ChainForkedError, Ledger
from shoal.crdt.own_chain import OwnPositions
from shoal.crdt.standing import Standing
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import digest_record
from tests.properties.test_ledger_machine import SwarmMachine

BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}
# Which examples there are follows from the modules that are loaded, too: hypothesis draws on the constants in them.
# Found after 4 to 391 examples, by bug and seed; whoever goes on for ten times as long has to look at the machine.
EXAMPLES_MAX = 4_000


def bug(plant: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BUGS[plant.__name__] = plant
    return plant


@bug
def evidence_is_dropped_with_its_era(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_shelve", lambda self, batch: None)


@bug
def a_third_entry_of_a_slot_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    offer = EvidenceShelf.offer

    def plant(self: EvidenceShelf, batch: Batch) -> bool:
        return self.slots.get(batch.author) != slot_of(batch) and offer(self, batch)

    patch.setattr(EvidenceShelf, "offer", plant)


@bug
def anybody_votes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(certified, "check_certificate", lambda *given: b"")


@bug
def the_first_certificate_of_a_result_stands(patch: pytest.MonkeyPatch) -> None:
    admit = CertifiedChain._admit

    def plant(self: CertifiedChain, *given: Any) -> bool:
        known = self.follows(digest_record(given[0].result))
        return not known and admit(self, *given)

    patch.setattr(CertifiedChain, "_admit", plant)


@bug
def old_eras_count_until_they_are_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ledger, "_is_current", lambda self, era: True)


@bug
def entries_from_the_future_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ledger, "is_due", lambda hlc, wall_ms: True)


@bug
def bans_are_not_heeded(patch: pytest.MonkeyPatch) -> None:
    is_counting = Standing.is_counting

    def plant(self: Standing, entry_id: EntryId, entry: Entry) -> bool:
        self._banned = frozenset()
        return is_counting(self, entry_id, entry)

    patch.setattr(Standing, "is_counting", plant)


@bug
def the_last_admission_is_the_only_one(patch: pytest.MonkeyPatch) -> None:
    decree = Standing.decree

    def plant(self: Standing, entry_id: EntryId, seq: int, body: Decree) -> None:
        decree(self, entry_id, seq, body)
        if isinstance(body, AdmissionBody):
            self._admitted = frozenset(body.peers)

    patch.setattr(Standing, "decree", plant)


@bug
def a_readmission_forgives_too_little(patch: pytest.MonkeyPatch) -> None:
    readmitted_until = Standing.readmitted_until

    def plant(self: Standing, author: PeerId) -> int:
        return max(0, readmitted_until(self, author) - 1)

    patch.setattr(Standing, "readmitted_until", plant)


@bug
def a_restart_forgets_the_own_chain(patch: pytest.MonkeyPatch) -> None:
    advance = OwnPositions.advance

    def plant(self: OwnPositions, batch: Batch) -> None:
        if len(batch.entries) == 1:
            advance(self, batch)

    patch.setattr(OwnPositions, "advance", plant)


@pytest.mark.parametrize("name", BUGS)
def test_the_machine_finds_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    # Not shrunk: that it is found is enough.
    profile = settings(
        max_examples=EXAMPLES_MAX,
        stateful_step_count=40,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises((AssertionError, ChainForkedError, KeyError)):
        run_state_machine_as_test(SwarmMachine, settings=profile)
