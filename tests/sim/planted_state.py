"""Planted bugs: the replicated log, the residual of error feedback, presence, restart."""

from dataclasses import replace
from typing import Any

import numpy as np

from shoal.protocol.contribution import Contributor, Frozen
from shoal.protocol.effects import Reduce
from shoal.protocol.messages import Certificate, Presence, Result
from shoal.protocol.presence import PresenceTable
from shoal.protocol.quorum import Head
from shoal.protocol.rounds import RoundCore
from tests.sim.oracle import find_span
from tests.sim.peer import SimPeer
from tests.sim.planted import Arena, Patches, bug

FEEDBACK = "error feedback is exact"
LIVENESS = "rounds commit after faults stop"


@bug(seed=2, by=FEEDBACK)
def residual_of_all_parts_settled(patches: Patches) -> None:
    """A peer settles the residual of parts that were certified without it, too."""

    def settle(old: Any, self: Contributor, frozen: Frozen, result: Result, index: int) -> Any:
        included = old(self, frozen, result, index)
        self.residual[:] = frozen.residual_next
        return included

    patches.wrap(Contributor, "settle", settle)


@bug(seed=1, by=FEEDBACK)
def residual_never_settled(patches: Patches) -> None:
    """What the code lost is not carried to the next contribution."""

    def settle(old: Any, self: Contributor, frozen: Frozen, result: Result, index: int) -> Any:
        before = self.residual.copy()
        included = old(self, frozen, result, index)
        self.residual[:] = before
        return included

    patches.wrap(Contributor, "settle", settle)


@bug(seed=1, by=FEEDBACK)
def residual_doubled(patches: Patches) -> None:
    """A contribution carries the residual twice."""

    def freeze(old: Any, self: Contributor, *args: Any) -> Frozen:
        self.residual *= np.float32(2)
        frozen: Frozen = old(self, *args)
        self.residual /= np.float32(2)
        return frozen

    patches.wrap(Contributor, "freeze", freeze)


@bug(seed=1, by=FEEDBACK)
def residual_settled_early(patches: Patches) -> None:
    """The new residual replaces the old one when the contribution is frozen, not when it is certified."""

    def freeze(old: Any, self: Contributor, *args: Any) -> Frozen:
        frozen: Frozen = old(self, *args)
        self.residual[:] = frozen.residual_next
        return frozen

    patches.wrap(Contributor, "freeze", freeze)


@bug(seed=65, by="what was taken back is not counted")
def taken_back_and_planned(patches: Patches) -> None:
    """A peer without a quorum takes for unplanned what it takes back, whether or not a plan had it."""

    def withdraw(old: Any, self: RoundCore, now: float) -> bool | None:
        return None if old(self, now) is None else False

    patches.wrap(RoundCore, "withdraw", withdraw)


@bug(seed=1, by=FEEDBACK)
def old_base(patches: Patches) -> None:
    """Work that missed a round stays anchored at the base from which it started."""
    bases: dict[Contributor, Any] = {}

    def freeze(old: Any, self: Contributor, number: int, base: Any, local: Any) -> Frozen:
        frozen: Frozen = old(self, number, bases.setdefault(self, base.copy()), local)
        return frozen

    def settle(old: Any, self: Contributor, *args: Any) -> Any:
        bases.pop(self, None)
        return old(self, *args)

    patches.wrap(Contributor, "freeze", freeze)
    patches.wrap(Contributor, "settle", settle)


@bug(arena=Arena.STORM, seed=1, by="bit parity")
def update_applied_twice(patches: Patches) -> None:
    """A restart applies the newest update once more: the crash came between the disk and the outer step."""

    def boot(old: Any, self: SimPeer) -> None:
        newest = max(self.disk.certificates, default=0)

        def apply(certificate: Any) -> Any:
            head = SimPeer._apply(self, certificate)
            if certificate.result.round == newest:
                self.replica.round -= 1
                SimPeer._apply(self, certificate)
            return head

        self._apply = apply  # type: ignore[method-assign]
        try:
            old(self)
        finally:
            del self._apply

    patches.wrap(SimPeer, "boot", boot)


@bug(arena=Arena.STORM, seed=1, by="bit parity")
def update_skipped_in_replay(patches: Patches) -> None:
    """A restart leaves out the first of two and more updates."""

    def boot(old: Any, self: SimPeer) -> None:
        first, newest = min(self.disk.certificates, default=0), max(self.disk.certificates, default=0)

        def apply(certificate: Any) -> Any:
            if certificate.result.round == first < newest:
                params, momentum = self.replica.params.copy(), self.replica.momentum.copy()
                head = SimPeer._apply(self, certificate)
                self.replica.params[:], self.replica.momentum[:] = params, momentum
                return head
            return SimPeer._apply(self, certificate)

        self._apply = apply  # type: ignore[method-assign]
        try:
            old(self)
        finally:
            del self._apply

    patches.wrap(SimPeer, "boot", boot)


@bug(arena=Arena.STORM, seed=1, by="bit parity")
def momentum_lost_in_restart(patches: Patches) -> None:
    """A restart brings back the parameters and forgets the outer momentum."""

    def boot(old: Any, self: SimPeer) -> None:
        old(self)
        self.replica.momentum.fill(0.0)

    patches.wrap(SimPeer, "boot", boot)


@bug(seed=1, by="bit parity")
def exact_value_applied_by_owner(patches: Patches) -> None:
    """An owner applies the aggregate itself, everybody else what its code decodes to."""
    owners: dict[bytes, SimPeer] = {}

    def reduced(old: Any, self: SimPeer, effect: Reduce, raw: bytes, digest: bytes) -> None:
        owners[digest] = self
        old(self, effect, raw, digest)

    def apply(old: Any, self: SimPeer, certificate: Certificate) -> Head:
        head: Head = old(self, certificate)
        for part, one in enumerate(certificate.result.parts):
            if owners.get(one.digest) is self:
                first, _ = find_span(self.manifest, certificate.result.round, part)
                self.replica.params[first] = np.nextafter(self.replica.params[first], np.float32(1))
        return replace(head, state_root=self.replica.root())

    patches.wrap(SimPeer, "_reduced", reduced)
    patches.wrap(SimPeer, "_apply", apply)


@bug(arena=Arena.STORM, seed=1, by="rounds are never undone")
def certificate_not_persisted(patches: Patches) -> None:
    """A certificate is applied and not written, so that a crash undoes the round."""

    def crash(old: Any, self: SimPeer, *args: Any) -> None:
        if self.disk.certificates:
            del self.disk.certificates[max(self.disk.certificates)]
        old(self, *args)

    patches.wrap(SimPeer, "crash", crash)


@bug(arena=Arena.STORM, seed=1, by=LIVENESS)
def never_catch_up(patches: Patches) -> None:
    """A peer that hears of later rounds asks nobody for them."""
    patches.set(RoundCore, "_note_behind", lambda self, *args: None)
    patches.set(RoundCore, "_help_behind", lambda self, *args: None)
    patches.set(RoundCore, "_answer_late", lambda self, *args: None)


@bug(seed=23, by="memory is bounded")
def received_parts_never_dropped(patches: Patches) -> None:
    """The bytes that an owner received are kept when the round is over."""

    class Hoard(dict[Any, Any]):
        def clear(self) -> None:
            pass

    def boot(old: Any, self: SimPeer) -> None:
        old(self)
        self.inbox = Hoard(self.inbox)

    patches.wrap(SimPeer, "boot", boot)


@bug(seed=1, by="every attempt ends in bounded time")
def lost_peer_never_found(patches: Patches) -> None:
    """A peer that was lost once stays lost, whatever is heard of it."""
    lost: set[tuple[int, bytes]] = set()

    def lose(old: Any, self: RoundCore, peer: bytes, now: float) -> None:
        lost.add((id(self), peer))
        old(self, peer, now)

    def observe(old: Any, self: RoundCore, presence: Presence, now: float) -> None:
        if (id(self), presence.peer) not in lost:
            old(self, presence, now)

    patches.wrap(RoundCore, "lose", lose)
    patches.wrap(RoundCore, "observe", observe)


@bug(arena=Arena.STORM, seed=2, by="two attempts in calm")
def old_presence_of_restarted_peer_wins(patches: Patches) -> None:
    """The incarnation is ignored: who restarts is not heard until its sequence has caught up."""

    def receive(old: Any, self: PresenceTable, presence: Presence, now: float) -> Any:
        known = self.newest(presence.peer)
        if known and presence.sequence <= known.sequence:
            return None
        return old(self, presence, now)

    patches.wrap(PresenceTable, "receive", receive)


@bug(seed=3757760220, by="two attempts in calm")
def proposer_that_abstains_is_waited_for(patches: Patches) -> None:
    """Who has forgotten its votes leads nothing, and says so; its attempts end by their deadlines all the same."""

    def leads_nothing(old: Any, self: RoundCore, peer: bytes) -> bool:
        return peer in self._lost

    patches.wrap(RoundCore, "_leads_nothing", leads_nothing)


@bug(seed=662366518, by="a declaration comes after its timer")
def farewell_of_an_expected_voter_is_not_told(patches: Patches) -> None:
    """A voter that has not been heard yet is leaving: the table lists it as alive, and the core never hears of it."""

    def receive(old: Any, self: PresenceTable, presence: Presence, now: float) -> Any:
        first = self.newest(presence.peer) is None
        seen = old(self, presence, now)
        return None if presence.leaving and first else seen

    patches.wrap(PresenceTable, "receive", receive)


@bug(seed=3095090335, by="a declaration comes after its timer")
def timer_not_stopped(patches: Patches) -> None:
    """A quorum that comes into sight while a certified round is fetched does not stop the declared timer."""

    def watch(old: Any, self: RoundCore, now: float) -> None:
        if self._decided is None:
            old(self, now)

    patches.wrap(RoundCore, "_watch_quorum", watch)


@bug(seed=2014656959, by="nobody declares before a quorum was there")
def late_start_taken_for_loss(patches: Patches) -> None:
    """Who is there first names itself after the declared timer, though the others are only late."""
    patches.set(RoundCore, "has_seen_quorum", True)
