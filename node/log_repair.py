"""Certified rounds that a damaged disk has lost, fetched again: gaps in the certificates before the head, the trail.

A repair of the ledger's file (node.repair) keeps its whole rows. What it has lost behind the head comes by catch-up. A
gap before the head, or in the trail over old rounds, hurts nobody at once; but this peer could lead no newcomer over
it, could not tell others' logs from its own there, and would never drop an old certificate again.

Invariants: what comes is checked as everywhere, from the round before the gap on, and must lead to what is held behind
it; a log that others cannot complete stays as it is and is looked at again; a trail with a gap is shown to nobody.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

from shoal.node.donors import DONORS_ASKED_MAX, Donors
from shoal.node.ledger_store import StoreError
from shoal.node.local_state import LocalState
from shoal.protocol.errors import Failure
from shoal.protocol.messages import CERTIFICATES_PER_ANSWER, Certificate
from shoal.protocol.trail import Anchor, anchor_of

RETRY_S = 30.0
GAP_ROUNDS_MAX = 4096  # fetched at once; the rest of a longer gap when these are stored
GAPS_MAX = 256  # looked at in one go

log = logging.getLogger("shoal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Rounds whose certificates are missing: from `first` on, up to `last`, behind what `after` names."""

    after: Anchor
    first: int
    last: int


class LogRepair:
    """All calls on the event loop. `tell` says what was found and mended."""

    def __init__(
        self,
        state: LocalState,
        donors: Donors,
        tell: Callable[[str], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._state = state
        self._donors = donors
        self._tell = tell
        self._pause = pause

    async def run(self) -> None:
        """Until nothing is missing."""
        told = False
        while not await self._try(told):
            told = True
            await self._pause(RETRY_S)

    async def _try(self, told: bool) -> bool:
        try:
            return await self.mend(told)
        except (OSError, StoreError) as error:
            log.error("certified rounds that this disk has lost were not stored: %s", error)
            return False

    async def mend(self, told: bool = False) -> bool:
        """Fetch what is missing from whoever is in sight; whether nothing is missing any more."""
        is_whole, gaps = await asyncio.to_thread(self.find)
        if is_whole and not gaps:
            return True
        rounds = sum(gap.last - gap.first + 1 for gap in gaps)
        missing = [
            *(() if is_whole else ("the trail over old rounds",)),
            *((f"{rounds} certificates",) if gaps else ()),
        ]
        what = " and ".join(missing)
        if not told:
            self._tell(f"{Failure.STORE_DAMAGED}: this disk has lost {what}; other peers are asked for it")
        if not is_whole and not await self._mend_trail():
            # What the own trail does not lead to may be a gap that begins with the first round.
            gaps = await asyncio.to_thread(self._find_from_manifest)
        for gap in gaps:
            if not await self._fill(gap):
                return False
        is_whole, gaps = await asyncio.to_thread(self.find)
        if is_whole and not gaps:
            await self._state.find_retained()
            self._tell(f"{what} that this disk had lost: fetched again")
        return is_whole and not gaps

    # -- what is missing ---------------------------------------------------------------------------------------------

    def find(self) -> tuple[bool, list[Gap]]:
        """Whether the trail is whole, and the gaps between its end and the own head. Blocking."""
        end = self._state.trail.examine()
        return end is not None, self._find_gaps(end)

    def _find_from_manifest(self) -> list[Gap]:
        return self._find_gaps(self._state.trail.genesis)

    def _find_gaps(self, end: Anchor | None) -> list[Gap]:
        store, head = self._state.stores.ledger, self._state.head.round
        first = store.get_first_round()
        if first is None:
            return []
        held = store.list_rounds(first, head + 1)
        gaps = []
        if end is not None and held and held[0] > end.round + 1:
            gaps.append(Gap(after=end, first=end.round + 1, last=held[0] - 1))
        for before, behind in pairwise(held):
            if behind > before + 1 and len(gaps) < GAPS_MAX:
                for own in self._state.load_certificates(before, 1):  # unless it was dropped meanwhile
                    gaps.append(Gap(after=anchor_of(own), first=before + 1, last=behind - 1))
        return gaps

    # -- from others -------------------------------------------------------------------------------------------------

    async def _mend_trail(self) -> bool:
        """Whether somebody's trail leads to the own log."""
        for donor in self._donors.of_round(0)[:DONORS_ASKED_MAX]:
            found = await self._donors.ask_trail(donor, self._state.trail.genesis)
            if not found:
                continue
            await self._lead_on(found[-1].certificate)
            if await asyncio.to_thread(self._state.trail.mend, found):
                return True
        return False

    async def _lead_on(self, end: Certificate) -> None:
        """A trail that ends before the own log: fetch what lies between."""
        first = await asyncio.to_thread(self._state.stores.ledger.get_first_round)
        if first is None or end.result.round >= first:
            return
        between = Gap(after=anchor_of(end), first=end.result.round + 1, last=first - 1)
        if await self._fill(between):
            await asyncio.to_thread(self._store, [end])

    async def _fill(self, gap: Gap) -> bool:
        """Fetch the certificates of a gap; whether it is closed."""
        found, after = list[Certificate](), gap.after
        while after.round < gap.last and len(found) < GAP_ROUNDS_MAX:
            donors = self._donors.of_round(after.round + 1)
            count = min(CERTIFICATES_PER_ANSWER, gap.last - after.round)
            page = (
                await self._donors.collect(donors[0], after.round + 1, count, after.digest, after.voters)
                if donors
                else ()
            )
            if not page:
                return False
            found += page
            after = anchor_of(page[-1])
        behind = await asyncio.to_thread(self._state.load_certificates, gap.last + 1, 1)
        if after.round == gap.last and [one.result.previous for one in behind] != [after.digest]:
            log.warning("what others hold of rounds %d to %d does not lead to the own log", gap.first, gap.last)
            return False
        await asyncio.to_thread(self._store, found)
        return after.round == gap.last

    def _store(self, found: list[Certificate]) -> None:
        for certificate in found:
            self._state.save_certificate(certificate)
        if found and found[0].result.round == 1:
            self._state.trail.forget()  # what is left of it leads nowhere, and nothing needs it
