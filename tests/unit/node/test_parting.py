"""Two logs of one swarm at one peer's disk: the heavier one stays, and what is given up is kept aside."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node import identity_file
from shoal.node.control import PeerUnreachable
from shoal.node.local_state import LocalState
from shoal.node.parting import Parting, PartingPorts
from shoal.node.reroot import sign_reroot
from shoal.protocol.contribution import Contributor
from shoal.protocol.effects import Pledge
from shoal.protocol.errors import ConfigError, Failure, ProtocolError, Refusal
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.lineage import weigh
from shoal.protocol.manifest import genesis_head
from shoal.protocol.messages import (
    CERTIFICATES_PER_ANSWER,
    Certificate,
    Checkpoint,
    Vote,
    digest_record,
    sign_message,
)
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head
from shoal.protocol.replica import Replica
from tests.unit.node.node_samples import Chain, Swarm, fill_folder, make_samples, open_state
from tests.unit.protocol.samples import IDENTITIES, PEERS, make_update

COMMON = 5
OWNER = IDENTITIES[0]


@pytest.fixture
def swarm() -> Swarm:
    return make_samples()


def sign_away(swarm: Swarm, head: Head, voters: tuple[PeerId, ...], owner: Identity = OWNER) -> Certificate:
    """The owner's re-root of the round after `head`."""
    result = make_voters_result(head, swarm.manifest.rounds.codec, voters)
    vote = Vote(voter=owner.peer, round=result.round, attempt=REROOT_ATTEMPT, result_digest=digest_record(result))
    return Certificate(result=result, attempt=REROOT_ATTEMPT, votes=(sign_message(owner, swarm.id, vote),))


def make_log(swarm: Swarm, rounds: int, *, seed: int = 0, reroots_after: int | None = None) -> Chain:
    """A certified log. The rounds up to COMMON are the same in all; `reroots_after` is followed by a re-root."""
    manifest = swarm.manifest
    replica = Replica(manifest, *(np.zeros(manifest.layout.elements, np.float32) for _ in range(2)))
    heads = [genesis_head(manifest, swarm.id, replica.reset())]
    certificates: list[Certificate] = []
    blobs: dict[bytes, bytes] = {}
    while len(certificates) < rounds:
        number = len(certificates) + 1
        encoded: dict[bytes, bytes] = {}
        if reroots_after is not None and number == reroots_after + 1:
            certificate = sign_away(swarm, heads[-1], PEERS[:2])
        else:
            update_seed = number if number <= COMMON else 1000 * (seed + 1) + number
            certificate, encoded = make_update(manifest, heads[-1], update_seed, swarm.id)
        root = replica.apply(certificate.result, encoded)
        digest = digest_record(certificate.result)
        heads.append(Head(round=number, digest=digest, state_root=root, voters=certificate.result.voters))
        certificates.append(certificate)
        blobs.update(encoded)
    return Chain(certificates=tuple(certificates), blobs=blobs, heads=tuple(heads), states={})


@dataclass(slots=True)
class Other:
    """The peer of the other log, and what the comparing one made of it."""

    chain: Chain
    switched: list[Pledge] = field(default_factory=list)
    pledge: Pledge | None = None  # of the one that compares
    accused: list[ProtocolError] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    asked: int = 0
    follows: Chain | None = None  # the log that it goes over to once it has been asked
    is_gone: bool = False
    kept_from: int = 1  # earlier certificates are not handed out
    page: int = CERTIFICATES_PER_ANSWER  # so many fit into an answer
    trail: tuple[Checkpoint, ...] = ()
    walked: int = 0  # how often the trail was asked for

    async def ask(self, peer: PeerId, first: int, count: int) -> tuple[Certificate, ...]:
        if self.is_gone:
            raise PeerUnreachable(peer, Failure.PEER_LOST, "it is gone")
        self.asked += 1
        certificates = self.chain.certificates[first - 1 : first - 1 + min(count, self.page)]
        self.chain = self.follows or self.chain
        return certificates if first >= self.kept_from else ()

    async def ask_trail(self, peer: PeerId) -> tuple[Checkpoint, ...]:
        self.walked += 1
        return self.trail

    async def switch(self, pledge: Pledge) -> None:
        self.switched.append(pledge)


async def compare(swarm: Swarm, folder: Path, mine: Chain, other: Other) -> LocalState:
    """The peer whose disk holds `mine` meets the other one."""
    fill_folder(swarm, folder, mine)
    state = open_state(swarm, folder)
    await state.restore()
    gone_over = await Parting(state, swarm.manifest.authority(swarm.id), make_ports(other)).run(PEERS[1])
    assert gone_over is bool(other.switched)
    return state


def make_ports(other: Other) -> PartingPorts:
    return PartingPorts(
        ask=other.ask,
        ask_trail=other.ask_trail,
        head_of=lambda peer: other.chain.heads[-1].round,
        switch=other.switch,
        pledge=lambda: other.pledge,
        misbehaved=lambda peer, error: other.accused.append(error),
        happen=other.told.append,
    )


@pytest.mark.parametrize(("mine", "theirs"), [(8, 12), (7, 60), (40, 45), (6, 30), (21, 30)])
async def test_the_lighter_log_is_left_at_the_round_where_they_part(
    swarm: Swarm, tmp_path: Path, mine: int, theirs: int
) -> None:
    other = Other(chain=make_log(swarm, theirs, seed=1))
    state = await compare(swarm, tmp_path, make_log(swarm, mine, reroots_after=COMMON), other)
    state.stores.ledger.close()
    (pledge,) = other.switched
    assert (pledge.first, pledge.end) == (COMMON + 1, theirs)
    assert pledge.digest == digest_record(other.chain.certificates[COMMON].result)
    assert pledge.tokens == weigh(other.chain.certificates[COMMON:]).tokens
    assert other.accused == []
    assert len(other.told) == 1 and "local work is kept" in other.told[0]


@pytest.mark.parametrize(("mine", "theirs"), [(12, 8), (60, 7), (45, 40)])
async def test_the_heavier_log_is_kept(swarm: Swarm, tmp_path: Path, mine: int, theirs: int) -> None:
    other = Other(chain=make_log(swarm, theirs, seed=1, reroots_after=COMMON))
    state = await compare(swarm, tmp_path, make_log(swarm, mine), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused, other.told) == ([], [], [])
    assert other.asked > 0


async def test_half_of_a_log_that_was_gone_over_to_weighs_as_much_as_all_of_it(swarm: Swarm, tmp_path: Path) -> None:
    other = Other(chain=make_log(swarm, 12, seed=1, reroots_after=COMMON))
    whole = make_log(swarm, 40)
    other.pledge = Pledge(
        first=COMMON + 1,
        digest=digest_record(whole.certificates[COMMON].result),
        end=40,
        tokens=weigh(whole.certificates[COMMON:]).tokens,
    )
    state = await compare(swarm, tmp_path, make_log(swarm, 8), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused) == ([], [])


async def test_one_log_that_is_longer_is_no_other_log(swarm: Swarm, tmp_path: Path) -> None:
    other = Other(chain=make_log(swarm, 20))
    state = await compare(swarm, tmp_path, make_log(swarm, 9), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused) == ([], [])


async def test_two_results_without_a_reroot_are_a_lie(swarm: Swarm, tmp_path: Path) -> None:
    other = Other(chain=make_log(swarm, 12, seed=1))
    state = await compare(swarm, tmp_path, make_log(swarm, 8), other)
    state.stores.ledger.close()
    assert other.switched == []
    assert [error.refusal for error in other.accused] == [Refusal.EQUIVOCATION]


async def test_a_heavier_log_with_a_forged_certificate_is_not_followed(swarm: Swarm, tmp_path: Path) -> None:
    chain = make_log(swarm, 20, seed=1)
    forged = replace(chain.certificates[14], votes=chain.certificates[13].votes)
    certificates: Sequence[Certificate] = (*chain.certificates[:14], forged, *chain.certificates[15:])
    other = Other(chain=replace(chain, certificates=tuple(certificates)))
    state = await compare(swarm, tmp_path, make_log(swarm, 7, reroots_after=COMMON), other)
    state.stores.ledger.close()
    assert other.switched == []
    assert [error.refusal for error in other.accused] == [Refusal.WRONG_ATTEMPT]


async def test_a_peer_that_is_gone_changes_nothing(swarm: Swarm, tmp_path: Path) -> None:
    other = Other(chain=make_log(swarm, 12, seed=1), is_gone=True)
    state = await compare(swarm, tmp_path, make_log(swarm, 8, reroots_after=COMMON), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused) == ([], [])


@pytest.mark.parametrize("page", [1, 7])
async def test_certificates_that_are_too_large_for_a_whole_page_are_all_weighed(
    swarm: Swarm, tmp_path: Path, page: int
) -> None:
    other = Other(chain=make_log(swarm, 45, seed=1), page=page)
    state = await compare(swarm, tmp_path, make_log(swarm, 40, reroots_after=COMMON), other)
    state.stores.ledger.close()
    (pledge,) = other.switched
    assert (pledge.first, pledge.end) == (COMMON + 1, 45)
    assert pledge.tokens == weigh(other.chain.certificates[COMMON:]).tokens


async def test_a_gap_where_the_logs_may_part_accuses_nobody(swarm: Swarm, tmp_path: Path) -> None:
    # Round 6 is the first of a page, and the first that differs of those that are there: round 5 may differ, too.
    other = Other(chain=make_log(swarm, 30, seed=1), kept_from=COMMON + 1)
    state = await compare(swarm, tmp_path, make_log(swarm, 21, reroots_after=COMMON), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused, other.told) == ([], [], [])
    assert other.asked == 2


@pytest.mark.parametrize("rounds", [8, COMMON], ids=["over here", "no further than the parting"])
async def test_a_peer_that_has_left_its_log_meanwhile_is_not_accused(swarm: Swarm, tmp_path: Path, rounds: int) -> None:
    mine = make_log(swarm, 8)
    other = Other(chain=make_log(swarm, 12, seed=1), follows=replace(mine, certificates=mine.certificates[:rounds]))
    state = await compare(swarm, tmp_path, mine, other)
    state.stores.ledger.close()
    assert (other.switched, other.accused, other.told) == ([], [], [])
    assert other.asked > 1


def shorten(swarm: Swarm, folder: Path, chain: Chain, first_kept: int) -> Other:
    """A peer that keeps the certificates of this log from that round on, and a trail over those before."""
    fill_folder(swarm, folder, chain)
    state = open_state(swarm, folder)
    state.trail.shorten(first_kept)
    trail = tuple(state.trail.load())
    assert state.stores.ledger.get_first_round() == first_kept and trail
    state.stores.ledger.close()
    return Other(chain=chain, kept_from=first_kept, trail=trail)


@pytest.mark.parametrize("own_reroot", [True, False])
async def test_who_was_away_with_few_rounds_goes_over_although_nobody_keeps_where_they_part(
    swarm: Swarm, tmp_path: Path, own_reroot: bool
) -> None:
    ours, theirs = (COMMON, None) if own_reroot else (None, COMMON)
    other = shorten(swarm, tmp_path / "other", make_log(swarm, 40, seed=1, reroots_after=theirs), 20)
    state = await compare(swarm, tmp_path / "own", make_log(swarm, 8, reroots_after=ours), other)
    state.stores.ledger.close()
    (pledge,) = other.switched
    assert (pledge.first, pledge.end) == (COMMON + 1, 40)
    assert pledge.tokens == weigh(other.chain.certificates[20:]).tokens, "what it weighs at least"
    assert other.accused == [] and len(other.told) == 1 and "local work is kept" in other.told[0]


@pytest.mark.parametrize("forgotten", [False, True], ids=["it is not heavier for certain", "the own side is not kept"])
async def test_a_parting_that_cannot_be_weighed_is_told_and_the_peer_stays(
    swarm: Swarm, tmp_path: Path, forgotten: bool
) -> None:
    other = shorten(swarm, tmp_path / "other", make_log(swarm, 40, seed=1), 20)
    mine = make_log(swarm, 8 if forgotten else 38, reroots_after=COMMON)
    if forgotten:
        fill_folder(swarm, tmp_path / "own", mine)
        state = open_state(swarm, tmp_path / "own")
        state.trail.shorten(COMMON + 3)
        state.stores.ledger.close()
        mine = replace(mine, certificates=())
    state = await compare(swarm, tmp_path / "own", mine, other)
    state.stores.ledger.close()
    assert (other.switched, other.accused) == ([], [])
    assert len(other.told) == 1 and f"parts at round {COMMON + 1}" in other.told[0] and "stays" in other.told[0]


async def test_a_trail_that_shows_no_parting_changes_nothing(swarm: Swarm, tmp_path: Path) -> None:
    other = shorten(swarm, tmp_path / "other", make_log(swarm, 40), 20)
    state = await compare(swarm, tmp_path / "own", make_log(swarm, 8), other)
    state.stores.ledger.close()
    assert (other.switched, other.accused, other.told, other.walked) == ([], [], [], 1)


async def test_one_peers_trail_is_walked_now_and_then_only(swarm: Swarm, tmp_path: Path) -> None:
    other = Other(chain=make_log(swarm, 40), kept_from=20)
    fill_folder(swarm, tmp_path, make_log(swarm, 8))
    state = open_state(swarm, tmp_path)
    await state.restore()
    parting = Parting(state, swarm.manifest.authority(swarm.id), make_ports(other))
    for _ in range(3):
        assert not await parting.run(PEERS[1])
    state.stores.ledger.close()
    assert other.walked == 1


async def test_going_back_keeps_the_common_rounds_the_residual_and_what_is_given_up(
    swarm: Swarm, tmp_path: Path
) -> None:
    mine = make_log(swarm, 9, reroots_after=COMMON)
    fill_folder(swarm, tmp_path, mine)
    state = open_state(swarm, tmp_path)
    assert await state.restore() == mine.heads[9]
    await state.write_snapshot()
    state.contributor = Contributor(swarm.manifest, np.full(swarm.manifest.layout.elements, 0.5, np.float32))
    head = await state.rewind(COMMON + 1)
    assert head == mine.heads[COMMON] == state.head
    assert state.replica.root() == head.state_root
    assert np.all(state.contributor.residual == np.float32(0.5))
    assert state.load_certificates(1, 20) == mine.certificates[:COMMON]
    assert state.stores.snapshots.rounds() == []
    theirs = make_log(swarm, 7, seed=1)
    for certificate in theirs.certificates[COMMON:]:
        head = await state.commit(certificate, lambda digest: memoryview(theirs.blobs[digest]))
    assert head == theirs.heads[7]
    state.stores.ledger.close()
    assert (await open_and_restore(swarm, tmp_path)) == theirs.heads[7], "and after a restart"


async def open_and_restore(swarm: Swarm, folder: Path) -> Head:
    state = open_state(swarm, folder)
    head = await state.restore()
    state.stores.ledger.close()
    return head


# -- the owner's word -----------------------------------------------------------------------------------------------


def lay_out(swarm: Swarm, folder: Path, chain: Chain, owner: Identity) -> Path:
    """The folder of a stopped peer, and the owner's key in it."""
    fill_folder(swarm, folder, chain)
    (folder / "manifest.shoal").write_bytes(swarm.signed)
    write_key(folder / "owner.key", owner)
    return folder / "owner.key"


def write_key(path: Path, owner: Identity) -> None:
    seed = next(seed for number in range(1, 9) if Identity(seed := bytes([number]) * 32).peer == owner.peer)
    path.touch(mode=0o600)
    path.write_text(f"{identity_file._HEADER}\n{seed.hex()}\n")


async def test_the_owner_names_new_voters_in_the_next_round(swarm: Swarm, tmp_path: Path) -> None:
    chain = make_log(swarm, 3)
    key = lay_out(swarm, tmp_path, chain, OWNER)
    done = sign_reroot(tmp_path, key, PEERS[1:3])
    assert (done.round, done.old_voters, done.voters) == (4, chain.heads[3].voters, PEERS[1:3])
    head = await open_and_restore(swarm, tmp_path)
    assert (head.round, head.voters) == (4, PEERS[1:3])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "manifest.shoal").unlink(), "holds no manifest"),
        (lambda folder: (folder / "owner.key").unlink(), "does not exist"),
        (lambda folder: write_key(folder / "owner.key", IDENTITIES[3]), "not the key of this swarm"),
    ],
)
def test_a_reroot_that_cannot_be_says_why(swarm: Swarm, tmp_path: Path, spoil: object, words: str) -> None:
    key = lay_out(swarm, tmp_path, make_log(swarm, 2), OWNER)
    assert callable(spoil)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=words):
        sign_reroot(tmp_path, key, PEERS[:1])


def test_a_reroot_names_somebody(swarm: Swarm, tmp_path: Path) -> None:
    key = lay_out(swarm, tmp_path, make_log(swarm, 2), OWNER)
    with pytest.raises(ConfigError, match="names 0 peers"):
        sign_reroot(tmp_path, key, ())
