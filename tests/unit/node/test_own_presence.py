"""What a peer says of itself: signed, ever newer, and no READY that does not stand."""

from pathlib import Path

from shoal.node.status import TrainerState
from shoal.protocol.messages import ADDRESSES_MAX, verify_message
from tests.unit.node.node_samples import make_samples, open_peer, open_peers, wait_until


async def test_every_presence_is_newer_and_signed(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        told = [peer.presence.describe() for _ in range(3)]
        assert [one.sequence for one in told] == [1, 2, 3]
        for one in told:
            verify_message(peer.me, peer.swarm.id, one)
            assert (one.peer, one.head_round, one.head_digest) == (peer.me, 0, peer.core.head.digest)
            assert one.phase == "gather" and one.trains and not one.leaving
            assert one.agent.endswith(" peer0")


async def test_a_ready_stands_for_the_open_round_only(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 2) as (ann, bob):
        assert ann.presence.describe().ready is None
        frozen = await ann.contribute(1)
        ready = ann.presence.describe().ready
        assert ready is not None and ready.ready.contribution_root == frozen.root
        stale = ann.presence.ready
        await bob.contribute(2)
        await wait_until(lambda: ann.core.round == 2)
        ann.presence.ready = stale
        assert ann.presence.describe().ready is None, "round 1 is over"


async def test_who_leaves_says_so_and_is_ready_for_nothing(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        await peer.contribute(1)
        peer.presence.leaving = True
        told = peer.presence.describe()
        assert told.leaving and told.ready is None


async def test_a_peer_whose_trainer_was_given_up_does_not_train(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        peer.compute.phase = TrainerState.STOPPED
        assert not peer.presence.describe().trains
        peer.compute.phase = TrainerState.STALLED
        assert not peer.presence.describe().trains, "nobody waits until it is started again"
        peer.compute.phase = TrainerState.STARTING
        assert not peer.presence.describe().trains
        peer.compute.phase = TrainerState.WAITING
        assert not peer.presence.describe().trains, "nobody waits until a person runs a script"
        peer.compute.phase = TrainerState.PAUSED
        assert peer.presence.describe().trains, "what it has done waits for its round"


async def test_a_bootstrap_peer_does_not_train(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        assert not peer.presence.describe().trains


async def test_addresses_are_those_where_the_peer_can_be_dialled_now(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        peer.presence.tensor_addresses = lambda: (("2a00::1", 9), ("192.0.2.7", 9)) * ADDRESSES_MAX
        told = peer.presence.describe()
        assert told.tensor_addresses == ("[2a00::1]:9", "192.0.2.7:9") * (ADDRESSES_MAX // 2)
        assert 0 < len(told.control_addresses) <= ADDRESSES_MAX
