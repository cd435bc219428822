"""How a peer comes back to the swarm's log, wired to its pieces as the daemon does it."""

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shoal.node.happenings import Severity
from shoal.node.head_watch import HeadWatch
from shoal.node.rejoin import Rejoin, RejoinPorts
from shoal.protocol.effects import Behind, Pledge
from shoal.protocol.identity import PeerId
from tests.unit.node.catchup_samples import assert_same_state, open_swarm, short_hope
from tests.unit.node.node_samples import Peer

__all__ = ["short_hope"]  # a fixture

ROUNDS = 3


@dataclass(slots=True)
class Daemon:
    """What coming back has asked for."""

    told: list[tuple[str, Severity]] = field(default_factory=list)
    switched: list[Pledge] = field(default_factory=list)
    begun: list[Coroutine[object, object, object]] = field(default_factory=list)
    may_catch_up: bool = True

    async def switch(self, pledge: Pledge) -> None:
        self.switched.append(pledge)

    async def finish(self) -> None:
        """Carry out what was begun."""
        begun, self.begun = self.begun, []
        await asyncio.gather(*begun)


def make_rejoin(peer: Peer, daemon: Daemon) -> Rejoin:
    return Rejoin(
        manifest=peer.swarm.manifest,
        swarm=peer.swarm.id,
        control=peer.control,
        links=peer.links,
        state=peer.state,
        folder=peer.folder / "catchup",
        core=peer.core,
        driver=peer.driver,
        head_watch=HeadWatch(peer.core),
        membership=peer.membership,
        providers=peer.providers,
        ports=RejoinPorts(
            install=peer.driver.install,
            switch=daemon.switch,
            misbehaved=peer.misbehaved,
            donor_failed=lambda donor, reason: peer.donor_failures.update([donor]),
            may_catch_up=lambda: daemon.may_catch_up,
            happen=lambda text, severity: daemon.told.append((text, severity)),
            spawn=daemon.begun.append,
        ),
    )


async def test_who_is_behind_says_so_and_catches_up(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS, donors=1) as (newcomer, (donor,), _):
        daemon = Daemon()
        rejoin = make_rejoin(newcomer, daemon)
        rejoin.behind(Behind(peer=donor.me, round=ROUNDS))
        await daemon.finish()
        assert_same_state(newcomer, donor)
        assert daemon.told == [("3 rounds behind: catching up from round 1 to 3", Severity.INFO)]
        assert daemon.switched == [] and newcomer.donor_failures == {}


async def test_a_peer_that_may_not_catch_up_now_does_not_begin(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS, donors=1) as (newcomer, (donor,), _):
        daemon = Daemon()
        rejoin = make_rejoin(newcomer, daemon)
        daemon.may_catch_up = False
        rejoin.behind(Behind(peer=donor.me, round=ROUNDS))
        assert (daemon.begun, daemon.told) == ([], [])
        daemon.may_catch_up = True
        rejoin.behind(Behind(peer=donor.me, round=ROUNDS))
        await daemon.finish()
        assert_same_state(newcomer, donor)


async def test_nothing_begins_while_a_catch_up_is_under_way(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, ROUNDS, donors=1) as (newcomer, (donor,), chain):
        daemon = Daemon()
        rejoin = make_rejoin(newcomer, daemon)
        rejoin.catch_up.active = True
        rejoin.behind(Behind(peer=donor.me, round=ROUNDS))
        assert daemon.begun == []
        rejoin.forked(donor.me)
        await daemon.finish()
        assert newcomer.state.head == chain.heads[0]


async def test_a_log_that_is_only_longer_is_no_other_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_swarm(tmp_path, ROUNDS, donors=1) as (newcomer, (donor,), _):
        daemon = Daemon()
        rejoin = make_rejoin(newcomer, daemon)
        ran: list[tuple[PeerId, int]] = []

        async def run(peer: PeerId, target: int) -> None:
            ran.append((peer, target))

        monkeypatch.setattr(rejoin.catch_up, "run", run)
        rejoin.forked(donor.me)
        await daemon.finish()
        assert (ran, daemon.switched, newcomer.misbehaviours) == ([], [], [])
