"""The READY of the open round: said when the trainer's work is frozen, and anew when what it says is not true any more.

Invariant: a READY is replaced only while no plan can have used it, and with nothing changed but whether parts may be
given to this peer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from shoal.node.exchange import PartExchange
from shoal.node.own_presence import OwnPresence
from shoal.node.training.messages import Ready as TrainerReady
from shoal.protocol.attendance import Attendance
from shoal.protocol.contribution import Frozen
from shoal.protocol.effects import Phase
from shoal.protocol.messages import Presence, Ready, sign_ready
from shoal.protocol.round_state import Offer


def may_own(reached: bool, others: Iterable[Presence]) -> bool:
    """Whether parts may be given to this peer: others can dial it, or none of those who train can be dialled. Then
    everybody owns, and parts take the ways around routers: a round that takes longer is better than none."""
    return reached or not any(one.trains and one.tensor_addresses and not one.leaving for one in others)


@dataclass(slots=True, kw_only=True)
class ReadyOffer:
    """All calls on the event loop."""

    presence: OwnPresence
    exchange: PartExchange
    reached: Callable[[], bool]  # whether others can dial this peer's tensor port
    others: Callable[[], Iterable[Presence]]  # who is in sight
    announce: Callable[[], None]
    pump: Callable[[], None]

    def make(self, frozen: Frozen, ready: TrainerReady, attendance: Attendance) -> None:
        """The trainer's work is frozen and encoded: become ready."""
        core = self.presence.core
        if self.presence.leaving or frozen.round != core.round or core.phase is Phase.APPLY:
            return
        said = Ready(
            round=frozen.round,
            base_root=core.head.state_root,
            contribution_root=frozen.root,
            tokens=ready.tokens,
            steps=max(1, ready.steps),
            norm=frozen.norm,
            owns=self._owns(),
            attendance=attendance,
        )
        self._publish(said, frozen)

    def correct(self) -> None:
        """Say it anew if it is not true any more, for as long as no plan uses it."""
        signed, frozen, core = self.presence.ready, self.exchange.frozen, self.presence.core
        if signed is None or frozen is None or self.presence.leaving or signed.ready.owns == self._owns():
            return
        if signed.ready.round == core.round and core.phase is Phase.GATHER:
            self._publish(replace(signed.ready, owns=self._owns()), frozen)

    def _owns(self) -> bool:
        return may_own(self.reached(), self.others())

    def _publish(self, said: Ready, frozen: Frozen) -> None:
        signed = sign_ready(self.presence.identity, self.presence.swarm, said)
        offer = Offer(signed=signed, digests=frozen.digests)
        if self.presence.core.offer(offer, self.exchange.ports.now()):
            self.presence.ready, self.exchange.frozen = signed, frozen
            self.announce()
        self.pump()
