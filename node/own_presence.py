"""The presence that this peer publishes: who it is, where it can be reached, where it stands.

Invariant: every description has a higher (incarnation, sequence) than the one before, across restarts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from shoal.dht.holdings import Holdings
from shoal.node.compute import Compute
from shoal.node.config import TRAINER, NodeConfig
from shoal.node.control import ControlPlane
from shoal.node.endpoints import format_endpoint
from shoal.node.link_port import Address
from shoal.node.status import TrainerState
from shoal.protocol.abstention import ABSTAINING
from shoal.protocol.admission import AdmissionProof
from shoal.protocol.identity import Identity
from shoal.protocol.messages import ADDRESSES_MAX, Presence, SignedReady, sign_message
from shoal.protocol.rounds import RoundCore

RELEASE = version("shoal")  # read from the disk once

# Who waits for a trainer that is only just starting, or hangs, waits for long.
UNABLE = (TrainerState.WAITING, TrainerState.STARTING, TrainerState.STALLED, TrainerState.STOPPED)


@dataclass(slots=True, kw_only=True)
class OwnPresence:
    """`ready` is the READY of the open round."""

    config: NodeConfig
    identity: Identity
    swarm: bytes
    incarnation: int
    control: ControlPlane
    core: RoundCore
    compute: Compute
    tensor_addresses: Callable[[], tuple[Address, ...]]  # where others can dial the tensor port now
    holdings: Callable[[], Holdings] = Holdings  # what others can fetch here
    admission: AdmissionProof | None = None  # shown to everybody, where the swarm is not open
    ready: SignedReady | None = None
    leaving: bool = False
    sequence: int = 0

    def describe(self) -> Presence:
        """The presence as of now, signed."""
        self.sequence += 1
        head = self.core.head
        progress = self.compute.progress
        holdings = self.holdings()
        stands = self.ready is not None and self.ready.ready.round == self.core.round and not self.leaving
        presence = Presence(
            peer=self.identity.peer,
            incarnation=self.incarnation,
            sequence=self.sequence,
            sent_at_s=time.time(),
            agent=f"shoal/{RELEASE} {self.config.node.name}".strip(),
            trains=self.config.node.role == TRAINER and self.compute.phase not in UNABLE,
            leaving=self.leaving,
            head_round=head.round,
            head_digest=head.digest,
            state_root=head.state_root,
            attempt=self.core.attempt,
            phase=self.core.phase.value if self.core.abstention is None else ABSTAINING,
            tensor_addresses=tuple(format_endpoint(one) for one in self.tensor_addresses()[:ADDRESSES_MAX]),
            control_addresses=self.control.addresses()[:ADDRESSES_MAX],
            tokens_per_s=progress.tokens_per_s if progress else 0.0,
            ready=self.ready if stands else None,
            updates_from=holdings.updates_from,
            snapshots=holdings.snapshots,
            admission=self.admission,
        )
        return sign_message(self.identity, self.swarm, presence)
