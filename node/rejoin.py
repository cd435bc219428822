"""How this peer comes back to the swarm's log: it catches up with who is ahead, and goes over to a heavier log.

Owns the two pieces that do it and decides when each begins.

Invariant: neither begins while a catch-up is under way.
"""

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from shoal.node.catchup import CatchUp, CatchUpPorts
from shoal.node.control import ControlPlane
from shoal.node.happenings import Severity
from shoal.node.head_watch import HeadWatch
from shoal.node.links import TensorLinks
from shoal.node.local_state import LocalState
from shoal.node.membership import Membership
from shoal.node.parting import Parting, PartingPorts
from shoal.node.providers import Providers
from shoal.node.round_driver import RoundDriver
from shoal.protocol.codecs import Float32s
from shoal.protocol.effects import Behind, Pledge
from shoal.protocol.errors import Failure, ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import Certified
from shoal.protocol.quorum import Head
from shoal.protocol.rounds import RoundCore


@dataclass(frozen=True, slots=True, kw_only=True)
class RejoinPorts:
    """What coming back asks of the daemon: `install` takes over a state that was checked, `switch` another log."""

    install: Callable[[Head, Float32s, Float32s], Awaitable[None]]
    switch: Callable[[Pledge], Awaitable[None]]
    misbehaved: Callable[[PeerId, ProtocolError], None]
    donor_failed: Callable[[PeerId, Failure], None]
    happen: Callable[[str, Severity], None]
    may_catch_up: Callable[[], bool]  # rarely, where this peer is banned
    spawn: Callable[[Coroutine[object, object, object]], None]


class Rejoin:
    """All calls on the event loop."""

    def __init__(
        self,
        *,
        manifest: Manifest,
        swarm: bytes,
        control: ControlPlane,
        links: TensorLinks,
        state: LocalState,
        folder: Path,
        core: RoundCore,
        driver: RoundDriver,
        head_watch: HeadWatch,
        membership: Membership,
        providers: Providers,
        ports: RejoinPorts,
    ) -> None:
        self._core = core
        self._membership = membership
        self._ports = ports
        self.catch_up = CatchUp(
            manifest=manifest,
            swarm=swarm,
            control=control,
            links=links,
            state=state,
            folder=folder,
            ports=CatchUpPorts(
                live=membership.table.live,
                addresses_of=membership.tensor_addresses_of,
                take_certificate=lambda one, peer: driver.receive(Certified(certificate=one), peer),
                wait_past=head_watch.wait_past,
                other_log=self.forked,
                install=ports.install,
                misbehaved=ports.misbehaved,
                donor_failed=ports.donor_failed,
                find_donors=lambda first, last: providers.find(first, last, membership),
            ),
        )
        self._parting = Parting(
            state,
            manifest.authority(swarm),
            PartingPorts(
                ask=self.catch_up.ask_certificates,
                ask_trail=lambda peer: self.catch_up.donors.ask_trail(peer, state.trail.genesis),
                head_of=membership.head_of,
                switch=ports.switch,
                pledge=core.pledge,
                misbehaved=ports.misbehaved,
                happen=lambda text: ports.happen(text, Severity.WARNING),
            ),
        )

    def behind(self, behind: Behind) -> None:
        """A peer has rounds that this one lacks."""
        if not self.catch_up.active and self._ports.may_catch_up():
            self._ports.spawn(self._catch_up(behind))

    def forked(self, peer: PeerId) -> None:
        """The peer follows another log."""
        self._ports.spawn(self._part(peer))

    async def _catch_up(self, behind: Behind) -> None:
        first = self._core.round
        if behind.round - first >= 1:
            text = f"{behind.round - first + 1} rounds behind: catching up from round {first} to {behind.round}"
            self._ports.happen(text, Severity.INFO)
        await self.catch_up.run(behind.peer, behind.round)

    async def _part(self, peer: PeerId) -> None:
        """Compare the two logs, and go over to the other one where it is the heavier one."""
        if not self.catch_up.active and await self._parting.run(peer):
            await self.catch_up.run(peer, self._membership.head_of(peer))
