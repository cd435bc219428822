"""What this peer can give to others of the log, and who else can: kept up to date, told in presence and in the DHT.

Invariants: what is announced was found on the disk; a look-up ends in bounded time and asks for at most KEYS_MAX keys.
"""

import asyncio
import logging
import time

from shoal.dht.addresses import keep_dialable
from shoal.dht.holdings import Holdings, HoldingsSchedule, donor_keys
from shoal.node.control import ControlPlane
from shoal.node.ledger_store import StoreError
from shoal.node.local_state import LocalState
from shoal.node.membership import Membership
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import SNAPSHOTS_TOLD_MAX

PERIOD_S = 5.0
DIALS_MAX = 4  # of donors that the DHT names, in one look-up

log = logging.getLogger(__name__)


class Providers:
    """`holdings` is as of the last `refresh`."""

    def __init__(self, me: PeerId, swarm: bytes, state: LocalState, control: ControlPlane) -> None:
        self.holdings = Holdings()
        self._me = me
        self._swarm = swarm
        self._state = state
        self._control = control
        self._schedule = HoldingsSchedule(swarm)
        self._whole = (1, 0)  # the rounds from .. to whose updates were found to be here

    async def run(self) -> None:
        """Look what is here and announce it, period after period."""
        while True:
            await self.refresh()
            if self._control.peers():
                key = self._schedule.poll(self.holdings, time.time())
                if key is not None:
                    self._schedule.note_announced(await self._control.provide(key), time.time())
            await asyncio.sleep(PERIOD_S)

    async def refresh(self) -> None:
        """Look what is here. Where the disk fails, what was found before stands."""
        try:
            self.holdings = await asyncio.to_thread(self._scan, self._state.head.round)
        except (OSError, StoreError) as error:
            log.warning("what this disk holds was not looked up: %s", error)

    def _scan(self, head: int) -> Holdings:
        first, last = self._whole
        if last > head:  # this peer has left its log and gone back
            first, last = 1, 0
        oldest = head + 1
        while oldest - 1 > last and self._has_update(oldest - 1):
            oldest -= 1
        if oldest - 1 == last and last:
            oldest = first  # they join what was found before; retention takes from its old end
            while oldest <= last and not self._has_update(oldest):
                oldest += 1
        self._whole = oldest, head
        snapshots = self._state.stores.snapshots.rounds()
        told = tuple(number for number in snapshots if number <= head)[-SNAPSHOTS_TOLD_MAX:]
        return Holdings(head=head, updates_from=oldest if oldest <= head else head + 1, snapshots=told)

    def _has_update(self, number: int) -> bool:
        found = self._state.load_certificates(number, 1) if number > 0 else ()
        # Retention removes an update as a whole: its ends tell.
        parts = found[0].result.parts if found else ()
        return bool(found) and all(self._state.stores.blobs.has(one.digest) for one in (*parts[:1], *parts[-1:]))

    async def find(self, first: int, last: int, membership: Membership) -> None:
        """Look in the DHT for donors of these rounds, and connect to some that were not known."""
        dialled = 0
        for key in donor_keys(self._swarm, first, last):
            for provider in await self._control.find_providers(key):
                known = membership.table.live()
                if provider.peer == self._me or provider.peer in known or dialled >= DIALS_MAX:
                    continue
                membership.book.hear(provider.peer, keep_dialable(provider.addresses, provider.peer), time.time())
                dialled += 1
                log.info("the DHT names %s as a donor", short_peer_id(provider.peer))
                await membership.connect(provider.peer)
