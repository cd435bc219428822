"""A log whose old certificates are dropped: what stays, on whose disk, and how a newcomer gets over it."""

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.node.certificate_trail import CertificateTrail
from shoal.node.ledger_store import LedgerStore, StoredCertificate, StoreError
from shoal.node.parting import Parting, PartingPorts
from shoal.node.repair import open_ledger
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.messages import CheckpointsAnswer, digest_record
from shoal.protocol.quorum import REROOT_ATTEMPT
from shoal.protocol.trail import Anchor
from shoal.protocol.wire import encode_record
from tests.unit.crdt.certificates import certify, make_authority, make_log, make_result
from tests.unit.node.catchup_samples import (
    FAR,
    NEWCOMER,
    SNAPSHOT,
    assert_same_state,
    assert_untouched,
    open_newcomer,
    open_swarm,
    rewrite_answers,
    short_hope,
)
from tests.unit.node.node_samples import WIDE_ELEMENTS, Chain, Swarm, fill_folder, make_chain
from tests.unit.protocol.samples import IDENTITIES

__all__ = ["short_hope"]  # a fixture
SWARM = b"s" * 32
ANNA = Identity(b"a" * 32)
LOG = make_log(SWARM, [ANNA], 40)
GENESIS = Anchor(round=0, digest=SWARM, voters=(ANNA.peer,))
CUT = 20


def open_log(path: Path, missing: frozenset[int] = frozenset()) -> tuple[LedgerStore, CertificateTrail]:
    store = LedgerStore.open(path)
    rows = [
        StoredCertificate(round=one.result.round, result_digest=digest_record(one.result), body=encode_record(one))
        for one in LOG
        if one.result.round not in missing
    ]
    store.fill(batches=(), certificates=rows, abandoned=rows[:9], checkpoints=(), records={})
    return store, CertificateTrail(store, GENESIS, make_authority(SWARM, ANNA.peer))


def make_rerooted_chain(swarm: Swarm, signer: Identity) -> Chain:
    """Three rounds, and a re-root after them by which the log parts from that of the others."""
    common = make_chain(swarm, 3)
    head = common.heads[3]
    named = replace(make_result(4, head.digest, head.voters[:1], {}), base_root=head.state_root)
    own = certify(swarm.id, named, [signer], REROOT_ATTEMPT)
    return replace(common, certificates=(*common.certificates, own))


def test_what_is_dropped_is_gone_from_the_disk_and_a_trail_leads_over_it(tmp_path: Path) -> None:
    store, trail = open_log(tmp_path / "ledger.sqlite")
    with store:
        for cut in (5, CUT, CUT - 1):
            trail.shorten(cut)
        assert store.get_first_round() == CUT
        assert len(store.list_certificates(0, 99)) == len(LOG) - CUT + 1
        assert [one.certificate.result.round for one in trail.load()] == [CUT]
        assert trail.check().digest == digest_record(LOG[CUT - 1].result)
        assert list(trail.load(CUT)) == []
        assert store._connection.execute("SELECT COUNT(*) FROM abandoned").fetchone() == (0,)


def test_a_crash_in_between_leaves_all_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, trail = open_log(tmp_path / "ledger.sqlite")
    with store:
        with monkeypatch.context() as patched:
            patched.setattr("shoal.node.ledger_store._PUT_CHECKPOINT", "no SQL")
            with pytest.raises(StoreError):
                trail.shorten(CUT)
        assert store.get_first_round() == 1 and list(trail.load()) == []
        trail.shorten(CUT)
        assert store.get_first_round() == CUT


def test_rounds_that_a_damaged_file_has_lost_are_led_over_or_nothing_is_dropped(tmp_path: Path) -> None:
    store, trail = open_log(tmp_path / "one.sqlite", missing=frozenset({7, 8}))
    with store:
        trail.shorten(CUT)
        assert trail.check().round == CUT
    store, trail = open_log(tmp_path / "other.sqlite", missing=frozenset({CUT}))
    with store:
        trail.shorten(CUT)
        assert store.get_first_round() == 1, "the round where the log would begin is not here"


def test_the_trail_is_among_what_is_saved_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    store, trail = open_log(path)
    with store:
        trail.shorten(CUT)
        store._connection.execute("UPDATE certificates SET body = x'00' WHERE round = 30")
    mended, repair = open_ledger(path, ANNA.peer, SWARM)
    with mended:
        assert repair is not None
        again = CertificateTrail(mended, GENESIS, make_authority(SWARM, ANNA.peer))
        assert again.check().round == CUT and mended.get_first_round() == CUT


# -- newcomers -------------------------------------------------------------------------------------------------------


async def test_a_newcomer_gets_over_rounds_that_nobody_keeps_and_leads_the_next_one(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        for donor in donors:
            donor.state.trail.shorten(CUT)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[1])
        assert newcomer.catch_up.snapshots_taken == 1
        assert newcomer.state.load_certificates(1, FAR) == ()
        assert newcomer.state.load_certificates(CUT, FAR) == chain.certificates[CUT - 1 :]
        assert newcomer.state.trail.check().digest == chain.heads[CUT].digest
        assert not newcomer.misbehaviours
        index = chain.index(SNAPSHOT)
        assert newcomer.state.stores.snapshots.get(SNAPSHOT) is not None and index.round == SNAPSHOT
        await newcomer.providers.refresh()
        async with open_newcomer(newcomer.swarm, tmp_path, [newcomer], NEWCOMER - 1) as next_one:
            await next_one.catch_up.run(newcomer.me, FAR)
            assert_same_state(next_one, newcomer)


async def test_who_was_away_for_longer_than_certificates_are_kept_goes_on(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        for donor in donors:
            donor.state.trail.shorten(CUT)
        fill_folder(newcomer.swarm, tmp_path / str(NEWCOMER - 1), make_chain(newcomer.swarm, 3))
        async with open_newcomer(newcomer.swarm, tmp_path, donors, NEWCOMER - 1) as away:
            assert away.state.head == chain.heads[3]
            await away.catch_up.run(donors[0].me, FAR)
            assert_same_state(away, donors[0])
            assert away.state.list_certificates(1, CUT) == (), "its own old ones lie before the trail's end"


async def test_who_stands_behind_a_reroot_that_the_trail_does_not_know_stays(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, _):
        for donor in donors:
            donor.state.trail.shorten(CUT)
        chain = make_rerooted_chain(newcomer.swarm, ANNA)
        fill_folder(newcomer.swarm, tmp_path / str(NEWCOMER - 1), chain)
        async with open_newcomer(newcomer.swarm, tmp_path, donors, NEWCOMER - 1) as away:
            await away.catch_up.run(donors[0].me, FAR)
            assert (away.state.head.round, away.state.head.digest) == (4, digest_record(chain.certificates[-1].result))
            assert away.other_logs == [donors[0].me], "the two logs are to be compared"


async def test_a_donor_that_lies_about_the_trail_is_charged_and_another_one_is_asked(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, _):
        for donor in donors:
            donor.state.trail.shorten(CUT)

        def cut_votes(message: object) -> object:
            if not isinstance(message, CheckpointsAnswer) or not message.checkpoints:
                return message
            (one,) = message.checkpoints
            few = replace(one.certificate, votes=one.certificate.votes[:1])
            return CheckpointsAnswer(checkpoints=(replace(one, certificate=few),))

        rewrite_answers(donors[0], cut_votes)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[1])
        assert newcomer.misbehaviours == [(donors[0].me, Refusal.NO_QUORUM)]


async def test_without_a_trail_that_leads_there_nothing_is_believed(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        donors[0].state.trail.shorten(CUT)
        donors[0].state.stores.ledger.shorten_log(CUT, ())
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_untouched(newcomer, chain)


async def test_who_parted_longer_ago_than_certificates_are_kept_goes_over_to_the_heavier_log(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, _):
        for donor in donors:
            donor.state.trail.shorten(CUT)
        owner = next(one for one in IDENTITIES if one.peer == newcomer.swarm.manifest.owner)
        chain = make_rerooted_chain(newcomer.swarm, owner)
        fill_folder(newcomer.swarm, tmp_path / str(NEWCOMER - 1), chain)
        async with open_newcomer(newcomer.swarm, tmp_path, donors, NEWCOMER - 1) as away:
            assert away.state.head.round == 4
            told: list[str] = []
            ports = PartingPorts(
                ask=away.catch_up.ask_certificates,
                ask_trail=lambda peer: away.catch_up.donors.ask_trail(peer, away.state.trail.genesis),
                head_of=away.membership.head_of,
                switch=away.driver.switch,
                pledge=away.core.pledge,
                misbehaved=away.misbehaved,
                happen=told.append,
            )
            assert await Parting(away.state, away.swarm.manifest.authority(away.swarm.id), ports).run(donors[0].me)
            assert away.core.head.round == 3 and away.core.pledge() is not None
            await away.catch_up.run(donors[0].me, FAR)
            assert_same_state(away, donors[0])
            assert away.core.pledge() is None and not away.misbehaviours
            assert len(told) == 1
