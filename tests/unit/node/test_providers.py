"""What a peer can give to others: found on the disk, told in presence and in the DHT, looked up there."""

from pathlib import Path

import pytest

from shoal.dht.holdings import Holdings, donor_keys
from shoal.dht.keys import snapshots_key
from shoal.node.ledger_store import StoreError
from shoal.protocol.errors import Failure
from shoal.protocol.messages import SNAPSHOTS_TOLD_MAX
from tests.unit.node.node_samples import fill_folder, make_chain, make_samples, open_peer, wait_until

ROUNDS = 6
SNAPSHOT = 4


async def test_what_is_on_the_disk_is_told_in_presence(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, ROUNDS, (SNAPSHOT,))
    fill_folder(swarm, tmp_path / "0", chain)
    async with open_peer(swarm, 0, tmp_path) as peer:
        assert peer.providers.holdings == Holdings(head=ROUNDS, updates_from=1, snapshots=(SNAPSHOT,))
        presence = peer.presence.describe()
        assert (presence.updates_from, presence.snapshots) == (1, (SNAPSHOT,))


async def test_updates_that_retention_has_removed_are_told_no_more(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, ROUNDS, (SNAPSHOT,))
    fill_folder(swarm, tmp_path / "0", chain)
    async with open_peer(swarm, 0, tmp_path) as peer:
        for number in (1, 2):
            for part in chain.certificates[number - 1].result.parts:
                peer.state.stores.blobs.remove(part.digest)
        await peer.providers.refresh()
        assert peer.providers.holdings.updates_from == 3


async def test_a_disk_that_fails_leaves_what_was_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = make_samples()
    fill_folder(swarm, tmp_path / "0", make_chain(swarm, ROUNDS, (SNAPSHOT,)))

    def fail(*_: object) -> None:
        raise StoreError(tmp_path, Failure.STORE_UNUSABLE, "it cannot be read", "mend it")

    async with open_peer(swarm, 0, tmp_path) as peer:
        before = peer.providers.holdings
        peer.providers._whole = (1, 0)
        monkeypatch.setattr(peer.state, "load_certificates", fail)
        await peer.providers.refresh()
        assert peer.providers.holdings == before


async def test_a_gap_is_not_told_as_held(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, ROUNDS, (SNAPSHOT,))
    fill_folder(swarm, tmp_path / "0", chain)
    async with open_peer(swarm, 0, tmp_path) as peer:
        for part in chain.certificates[SNAPSHOT - 1].result.parts:
            peer.state.stores.blobs.remove(part.digest)
        again = type(peer.providers)(peer.me, swarm.id, peer.state, peer.control)
        await again.refresh()
        assert again.holdings.updates_from == SNAPSHOT + 1


async def test_a_newcomer_tells_of_nothing(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 7, tmp_path) as peer:
        assert peer.providers.holdings == Holdings(head=0, updates_from=1, snapshots=())
        assert len(peer.presence.describe().snapshots) <= SNAPSHOTS_TOLD_MAX


async def test_donors_that_nobody_has_met_are_found_in_the_dht(tmp_path: Path) -> None:
    swarm = make_samples()
    chain = make_chain(swarm, ROUNDS, (SNAPSHOT,))
    for number in (0, 1):
        fill_folder(swarm, tmp_path / str(number), chain)
    async with (
        open_peer(swarm, 0, tmp_path) as donor,
        open_peer(swarm, 1, tmp_path) as known,
        open_peer(swarm, 7, tmp_path) as newcomer,
    ):
        await donor.connect(known)
        donor.spawn(donor.providers.run())
        await wait_until(lambda: swarm.network.providers.get(snapshots_key(swarm.id, SNAPSHOT)) == {donor.me})
        assert set(donor_keys(swarm.id, 1, ROUNDS)) & set(swarm.network.providers)
        await newcomer.connect(known)
        assert donor.me not in {one.peer for one in newcomer.control.peers()}
        await newcomer.providers.find(1, ROUNDS, newcomer.membership)
        assert donor.me in {one.peer for one in newcomer.control.peers()}
