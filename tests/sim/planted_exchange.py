"""Planted bugs: plans, the exchange of parts, their reduction, deadlines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.protocol import aggregators, exchange, messages, proposer
from shoal.protocol.codecs import CODECS, Codec, Float32s
from shoal.protocol.effects import Phase, Reduce
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.exchange import Inbox
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import PartDone, Plan, RosterEntry, SignedReady
from shoal.protocol.quorum import make_bitmap
from shoal.protocol.round_state import RoundState
from shoal.protocol.rounds import RoundCore
from tests.sim.oracle import find_span
from tests.sim.peer import SimPeer
from tests.sim.planted import Arena, Patches, bug
from tests.sim.world import World

AGGREGATE = "result = aggregate of the bitmap's members"
ACCUSED = "no honest peer is accused"
LIVENESS = "rounds commit after faults stop"
Addend = tuple[RosterEntry, bytes]


@bug(seed=1, by=AGGREGATE)
def summed_in_order_of_arrival(patches: Patches) -> None:
    """An owner adds contributions as they came, not in roster order."""

    def as_they_came(peer: SimPeer, effect: Reduce) -> list[Addend]:
        came = {sender: at for at, (sender, part, _) in enumerate(peer.inbox) if part == effect.part}
        addends = list(zip(effect.members, effect.digests, strict=True))
        return sorted(addends, key=lambda addend: came.get(addend[0].signed.peer, -1), reverse=True)

    _add_otherwise(patches, as_they_came)


@bug(arena=Arena.STORM, seed=5, by=AGGREGATE)
def duplicate_part_added_again(patches: Patches) -> None:
    """An owner takes a part that comes twice, and adds it twice."""
    twice: set[tuple[int, PeerId, bytes]] = set()

    def check(old: Any, self: Inbox, sender: PeerId, part: int, digest: bytes) -> Refusal | None:
        refusal: Refusal | None = old(self, sender, part, digest)
        if refusal is Refusal.DUPLICATE:
            twice.add((id(self), sender, digest))
            return None
        return refusal

    def with_duplicates(peer: SimPeer, effect: Reduce) -> list[Addend]:
        addends = list(zip(effect.members, effect.digests, strict=True))
        inbox = id(peer.core._inbox)
        return addends + [one for one in addends if (inbox, one[0].signed.peer, one[1]) in twice]

    patches.wrap(Inbox, "check_part", check)
    _add_otherwise(patches, with_duplicates)


@bug(arena=Arena.STORM, seed=6, by=AGGREGATE)
def two_contributions_of_one_sender(patches: Patches) -> None:
    """An owner adds both contributions of a sender that restarted between them."""

    def with_old_ones(peer: SimPeer, effect: Reduce) -> list[Addend]:
        addends = list(zip(effect.members, effect.digests, strict=True))
        for sender, part, digest in peer.inbox:
            for entry, planned in addends[: len(effect.members)]:
                if part == effect.part and sender == entry.signed.peer and digest != planned:
                    addends.append((entry, digest))
        return addends

    _add_otherwise(patches, with_old_ones)


def _add_otherwise(patches: Patches, choose: Callable[[SimPeer, Reduce], list[Addend]]) -> None:
    """Let an owner add other contributions than the reduction names, or in another order."""
    chosen: list[tuple[SimPeer, list[Addend]]] = []

    def reduce_part(old: Any, self: SimPeer, effect: Reduce) -> None:
        chosen.append((self, choose(self, effect)))
        old(self, effect)
        chosen.pop()

    def reduce(old: Any, self: World, manifest: Any, effect: Reduce, encoded: list[bytes]) -> bytes:
        peer, addends = chosen[-1]
        known = dict(zip(effect.digests, encoded, strict=True))
        raw = [known.get(digest) or peer.inbox[entry.signed.peer, effect.part, digest] for entry, digest in addends]
        other = replace(effect, members=tuple(entry for entry, _ in addends))
        return bytes(old(self, manifest, other, raw))

    patches.wrap(SimPeer, "_reduce", reduce_part)
    patches.wrap(World, "reduce", reduce)


@bug(seed=1, by=AGGREGATE)
def denominator_of_whole_roster(patches: Patches) -> None:
    """The sum is divided by the weights of all members of the plan, the missing ones included."""

    def average(
        old: Any, codec: Codec, parts: Sequence[aggregators.WeightedPart], factors: Any, out: Float32s, *place: int
    ) -> None:
        old(codec, parts, factors, out, *place)
        weights = np.float32(0)
        for part in parts:
            weights = weights + np.float32(part.weight)
        if weights < np.float32(0.999):
            np.multiply(out, weights, out=out)

    patches.wrap(aggregators, "_average", average)


@bug(seed=1, by=AGGREGATE)
def equal_weights(patches: Patches) -> None:
    """The plan's weights are not used: every contribution weighs the same."""

    def average(old: Any, codec: Codec, parts: Any, factors: Any, out: Float32s, *place: int) -> None:
        old(codec, [replace(part, weight=0.5) for part in parts], [np.float32(0.5)] * len(parts), out, *place)

    patches.wrap(aggregators, "_average", average)


@bug(seed=1, by=ACCUSED)
def weights_of_the_proposer(patches: Patches) -> None:
    """A proposer invents the weights of its plan."""

    def plan(old: Any, *args: Any) -> Plan | None:
        made: Plan | None = old(*args)
        return made and replace(made, roster=tuple(replace(entry, weight=0.5) for entry in made.roster))

    old = proposer.make_plan
    patches.everywhere(old, lambda *args: plan(old, *args))


@bug(seed=4, by="weights as planned")
def weights_not_from_readies(patches: Patches) -> None:
    """All agree on weights that do not follow from the tokens and steps of the READYs."""

    def weigh(roster: tuple[SignedReady, ...], rule: str) -> tuple[float, ...]:
        return tuple(float(np.float32(1 / len(roster))) for _ in roster)

    patches.everywhere(proposer.list_weights, weigh)


@bug(seed=1, by=AGGREGATE)
def bitmap_names_everybody(patches: Patches) -> None:
    """An owner's bitmap names senders whose part it does not have."""

    def send(old: Any, self: RoundState, peer: PeerId, message: Any) -> None:
        if isinstance(message, PartDone) and self._plan:
            count = len(self._plan.roster)
            message = replace(message, contributors=make_bitmap(frozenset(range(count)), count))
        old(self, peer, message)

    def verify(old: Any, peer: PeerId, swarm: bytes, message: Any) -> None:
        if not isinstance(message, PartDone):
            old(peer, swarm, message)

    check = messages.verify_message
    patches.everywhere(check, lambda *args: verify(check, *args))
    patches.wrap(RoundState, "_send", send)


@bug(arena=Arena.SCHEDULE, seed=33, by=AGGREGATE)
def part_of_another_roster(patches: Patches) -> None:
    """A reduction that was begun under another attempt's roster is reported under this one's."""

    def reduced(
        old: Any, self: RoundCore, number: int, attempt: int, part: int, digest: bytes, members: Any, now: float
    ) -> None:
        if self._plan is not None and number == self.round:
            fit = frozenset(index for index in members if index < len(self._plan.roster)) or frozenset({0})
            old(self, number, self.attempt, part, digest, fit, now)

    patches.wrap(RoundCore, "part_reduced", reduced)


@bug(seed=1, by=ACCUSED)
def stale_ready_planned(patches: Patches) -> None:
    """A proposer plans with a READY of a round that is over."""

    def ready(old: Any, self: RoundState) -> dict[PeerId, SignedReady]:
        stale = {peer: known.ready for peer, known in self._members.items() if known.ready and not known.leaving}
        return {**stale, **old(self)}

    patches.wrap(RoundState, "_ready_members", ready)


@bug(seed=1, by="bit parity")
def local_value_for_missing_part(patches: Patches) -> None:
    """Where a part of the update has not come in time, a peer takes its own contribution for it."""

    def missing(old: Any, self: RoundCore, result: Any) -> set[bytes]:
        return set() if self._decided else old(self, result)

    def commit(old: Any, self: SimPeer, certificate: Any) -> None:
        for number, part in enumerate(certificate.result.parts):
            if part.digest not in self.blobs:
                first, end = find_span(self.manifest, certificate.result.round, number)
                nothing = bytes(CODECS[certificate.result.codec].encode(np.zeros(end - first, np.float32)))
                own = bytes(self.frozen.encoded[number]) if self.frozen else nothing
                self.blobs[part.digest] = own
        old(self, certificate)

    patches.wrap(RoundCore, "_missing", missing)
    patches.wrap(SimPeer, "_begin_commit", commit)


@bug(arena=Arena.STORM, seed=2, by="every attempt ends in bounded time")
def no_deadline_in_exchange(patches: Patches) -> None:
    """Nothing ends an exchange in which nothing moves."""
    _forget_deadline(patches, Phase.EXCHANGE)


@bug(arena=Arena.STORM, seed=3, by="every attempt ends in bounded time")
def no_deadline_in_commit(patches: Patches) -> None:
    """Nothing ends an attempt whose votes do not come."""
    _forget_deadline(patches, Phase.COMMIT)


@bug(arena=Arena.STORM, seed=35, by="every attempt ends in bounded time")
def no_deadline_in_prepare(patches: Patches) -> None:
    """Nothing ends an attempt whose promises do not come."""
    _forget_deadline(patches, Phase.PREPARE)


@bug(arena=Arena.STORM, seed=1, by=LIVENESS)
def no_deadline_in_gather(patches: Patches) -> None:
    """Nobody replaces a proposer that makes no plan."""

    def gather(old: Any, self: RoundCore, *args: Any) -> None:
        old(self, *args)
        if self.phase is Phase.GATHER and not self._lead:
            self._deadline_s = None

    patches.wrap(RoundCore, "_gather", gather)


def _forget_deadline(patches: Patches, forgotten: Phase) -> None:
    def set_phase(old: Any, self: RoundState, phase: Phase, deadline_s: float | None) -> None:
        old(self, phase, float("inf") if phase is forgotten else deadline_s)

    patches.wrap(RoundState, "_set_phase", set_phase)


@bug(arena=Arena.STORM, seed=7, by=LIVENESS)
def silent_sender_waited_for(patches: Patches) -> None:
    """An owner waits for every member of the roster, lost or not."""
    old = exchange.list_missing

    def list_missing(plan: Plan, lost: Any, deadlines: Mapping[int, float], now: float) -> Any:
        return old(plan, frozenset(), dict.fromkeys(deadlines, float("inf")), now)

    patches.everywhere(old, list_missing)


@bug(arena=Arena.STORM, seed=1, by=LIVENESS)
def parts_never_fetched(patches: Patches) -> None:
    """Who misses a part of a certified update does not ask for it."""
    patches.set(RoundCore, "_fetch_missing", lambda self, *args: None)


@bug(arena=Arena.STORM, seed=1, by=ACCUSED)
def plan_refused_after_own_deadline(patches: Patches) -> None:
    """A peer that gave up too early accuses the proposer whose plan comes then."""

    def take_plan(old: Any, self: RoundCore, plan: Plan, *args: Any) -> None:
        if plan.attempt < self.attempt:
            raise ProtocolError(Refusal.WRONG_ATTEMPT, f"plan of attempt {plan.attempt} in attempt {self.attempt}")
        old(self, plan, *args)

    patches.wrap(RoundCore, "_take_plan", take_plan)


@bug(arena=Arena.DRILL, seed=2, by="a death costs one time-out")
def dead_owner_never_replaced(patches: Patches) -> None:
    """The parts of an owner that dies are given to nobody: the attempt ends instead."""
    patches.everywhere(proposer.choose_owner, lambda *args: None)


@bug(arena=Arena.DRILL, seed=2, by="only what a dead peer owned is sent again")
def everything_sent_again(patches: Patches) -> None:
    """When a part is given to another owner, everybody sends all of its parts once more."""

    def follow(old: Any, self: RoundCore, plan: Plan, *args: Any) -> None:
        if plan.revision:
            self._sent.clear()
        old(self, plan, *args)

    patches.wrap(RoundCore, "_follow_plan", follow)


@bug(arena=Arena.DRILL, seed=2, by="a death costs one time-out")
def loss_not_believed(patches: Patches) -> None:
    """A connection that ends tells nothing: whoever is gone is waited for until a deadline passes."""
    patches.set(SimPeer, "connection_reset", lambda self, peer: None)


@bug(arena=Arena.DRILL, seed=21, by="a death costs one time-out")
def part_done_without_bytes(patches: Patches) -> None:
    """A proposer takes an owner's word for the bytes, which may be gone with the owner."""

    def take(old: Any, self: RoundCore, message: PartDone, *args: Any) -> None:
        old(self, message, *args)
        if self._lead and message.part in self._lead.done:
            self._lead.open.drop(message.part)

    patches.wrap(RoundCore, "_take_part_done", take)


@bug(seed=146183191, by=LIVENESS)
def late_reduction_forgotten(patches: Patches) -> None:
    """The bytes of a reduction that ends after its attempt are here, and the core does not know it."""

    def reduced(old: Any, self: RoundCore, number: int, attempt: int, *rest: Any) -> None:
        if attempt == self.attempt:
            old(self, number, attempt, *rest)

    patches.wrap(RoundCore, "part_reduced", reduced)
