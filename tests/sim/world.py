"""The simulated world: one heap of (time, sequence, action), one seed, a list of faults, many peers.

    python -m tests.sim.world --seed 7            replay one seed
    python -m tests.sim.world --rounds 20000      many seeds, new ones each run, printed

Each seed draws its cluster, its rates and from them its faults, runs a fault phase, then a calm phase in which rounds
must be certified again. A run is a function of the seed and the faults.
"""

import heapq
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from shoal.protocol.abstention import FRESH_ATTEMPT
from shoal.protocol.aggregators import WeightedPart
from shoal.protocol.effects import AttemptFailed, Note, PhaseEntered, Reduce
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Manifest, genesis_head
from shoal.protocol.messages import SCHEMA, Presence
from shoal.protocol.quorum import Head
from shoal.protocol.replica import Replica, make_reduction
from tests.sim import oracle, shortcuts, signatures
from tests.sim.checkers import Checker, broken
from tests.sim.clusters import (
    Cluster,
    draw_cluster,
    let_codecs_differ,
    let_fragments_alternate,
    let_part,
    let_train_on,
    let_weights_differ,
    make_world_manifest,
)
from tests.sim.faults import (
    FAULT_PHASE_S,
    DelayShape,
    DiskFate,
    Fault,
    FaultKind,
    Lie,
    Moment,
    Rates,
    draw_faults,
    draw_rates,
)
from tests.sim.liars import Liar
from tests.sim.naming import name_swarm
from tests.sim.network import Network
from tests.sim.parting import sign_reroot
from tests.sim.peer import CONTROL_BYTES, SimPeer
from tests.sim.signatures import SimIdentity
from tests.sim.trace import Trace

Message = TypeVar("Message")

CALM_LIMIT_S = 400.0
CALM_ROUNDS = 3
ATTEMPTS_IN_CALM = 2
TEND_PERIOD_S = 5.0
OWNER_LOOKS_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    rounds: int
    attempts_failed: Counter[str]
    faults: Counter[str]
    participants: float
    virtual_s: float
    trace: str


class World:
    """`rates` or `faults` take the place of what the seed would draw."""

    def __init__(
        self,
        seed: int,
        rates: Rates | None = None,
        *,
        faults: Sequence[Fault] | None = None,
        cluster: Cluster | None = None,
        verbose: bool = False,
    ) -> None:
        signatures.install()
        self.seed = seed
        self.now = 0.0
        rng = random.Random(f"{seed}/cluster")
        if cluster is None:
            cluster = let_part(draw_cluster(rng), random.Random(f"{seed}/reroot"))
            cluster = let_codecs_differ(cluster, random.Random(f"{seed}/two codecs"))
            # With these numbers the seeds that tests name keep their worlds.
            cluster = let_fragments_alternate(cluster, random.Random(f"{seed}/fragments 3793"))
            cluster = let_weights_differ(cluster, random.Random(f"{seed}/weights 37314"))
            cluster = let_train_on(cluster, random.Random(f"{seed}/gossip 1419"))
        self.cluster = cluster
        self.rates = rates or draw_rates(rng, may_lie=bool(self.cluster.liars))
        drawn = draw_faults(random.Random(f"{seed}/faults"), self.rates, self.cluster.population())
        self.faults = drawn if faults is None else tuple(faults)
        self.armed: dict[Moment, list[Fault]] = {}
        self.failures: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.happenings: list[str] = []
        self.trace = Trace(verbose)
        self.network = Network(seed, self.schedule)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._sequence = itertools.count()
        self._active: dict[int, Fault] = {}  # what lasts, by index
        self._calm = False
        self._settled_s = 0.0  # until then peers come, go, or have not heard of each other
        self._lived: list[Head] = []  # on which logs peers were when faults stopped
        self._populate(rng)

    def _populate(self, rng: random.Random) -> None:
        cluster = self.cluster
        identities = [SimIdentity(rng.randbytes(32)) for _ in range(cluster.everybody)]
        self.owner = SimIdentity(random.Random(f"{self.seed}/owner").randbytes(32))
        owner = self.owner if cluster.may_part else identities[0]
        self.manifest = make_world_manifest(cluster, owner, tuple(identities[: cluster.founders]))
        swarm = name_swarm(self.manifest)
        self._reduction = make_reduction(self.manifest)
        blank = Replica(self.manifest, np.zeros(cluster.elements, np.float32), np.zeros(cluster.elements, np.float32))
        genesis = genesis_head(self.manifest, swarm, blank.reset())
        self.checker = Checker(self.manifest, swarm, genesis, may_part=cluster.may_part)
        self.everybody: list[SimPeer] = [
            (Liar if number in cluster.liars else SimPeer)(self, number, one, self.manifest, swarm)
            for number, one in enumerate(identities)
        ]
        self.by_id = {peer.identity.peer: peer for peer in self.everybody}
        self.peers = self.everybody[: cluster.first]
        self.waiting = self.everybody[cluster.first :]
        self._at_owner: SimPeer | None = None  # it is down, and the owner signs there
        self._boot_times = [rng.uniform(0.0, 3.0) for _ in self.peers]

    # -- the heap ------------------------------------------------------------------------------------------------

    def schedule(self, delay_s: float, action: Callable[..., None], *args: object) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._sequence), action, args))

    def record(self, text: str) -> None:
        self.trace.add(f"{self.now:.6f} {text}")

    def note(self, peer: SimPeer, effect: Note) -> None:
        attempt = getattr(effect, "attempt", "")
        detail = getattr(effect, "phase", "") or getattr(effect, "reason", "")
        self.record(f"{peer.number} {type(effect).__name__} {effect.round}/{attempt} {detail}")
        if isinstance(effect, PhaseEntered):
            self.checker.entered(peer, effect.phase)
        elif isinstance(effect, AttemptFailed):
            self.failures[effect.reason.value] += 1

    def happen(self, text: str) -> None:
        self.happenings.append(f"{self.now:9.3f} {text}")
        self.record(text)

    def carry(self, message: Message) -> Message:
        """What arrives of a message."""
        if self.cluster.on_the_wire:
            carried: Message = SCHEMA.decode_untrusted(SCHEMA.encode(message))
            assert carried == message, "what is decoded is what was encoded"
            return carried
        return message

    def gossip(self, peer: SimPeer, presence: Presence) -> None:
        """To everybody that a chain of connections leads to."""
        presence = self.carry(presence)
        targets = [other.number for other in self.peers if other is not peer and other.up]
        self.network.gossip(peer.number, targets, CONTROL_BYTES, self.now, self._hear, presence)

    def _hear(self, target: int, presence: Presence) -> None:
        source = self.by_id[presence.peer].number
        other = self.everybody[target]
        other.arrive(source, f"Presence {presence.sequence}", other.hear, presence)

    def reduce(self, manifest: Manifest, effect: Reduce, encoded: list[bytes]) -> bytes:
        """The production reduction of one part."""
        first, end = oracle.find_span(manifest, effect.round, effect.part)
        pairs = zip(encoded, effect.members, strict=True)
        parts = [WeightedPart(encoded=raw, weight=entry.weight) for raw, entry in pairs]
        return bytes(self._reduction.reduce_part(parts, end - first))

    # -- a run ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """The fault phase, then the calm phase; raises InvariantBroken."""
        with shortcuts.in_use():
            return self._run()

    def _run(self) -> Outcome:
        for peer, at_s in zip(self.peers, self._boot_times, strict=True):
            self.schedule(at_s, peer.boot)
        for index, fault in enumerate(self.faults):
            if fault.detail == DiskFate.BACKUP:
                self.schedule(fault.at_s - fault.amount, self._back_up, fault)
            self.schedule(fault.at_s, self._strike, index, fault)
        self._run_until(FAULT_PHASE_S, None)
        self._begin_calm()
        if self.cluster.may_part:
            self._come_together()
        self._run_calm_rounds()
        if self.cluster.may_part:
            self.checker.logs.check_chosen(max(self._heads(), key=lambda head: head.round), self._lived)
        counts = [count for count in self.checker.participants.values() if count]
        return Outcome(
            seed=self.seed,
            rounds=len(self.checker.results),
            attempts_failed=self.failures,
            faults=self.struck,
            participants=sum(counts) / max(len(counts), 1),
            virtual_s=self.now,
            trace=self.trace.digest(),
        )

    def _run_until(self, end: float, done: Callable[[], bool] | None) -> None:
        count = 0
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, action, args = heapq.heappop(heap)
            action(*args)
            count += 1
            if done and count % 64 == 0 and done():
                return
        if not (done and heap):
            self.now = end

    # -- faults --------------------------------------------------------------------------------------------------

    def _strike(self, index: int, fault: Fault) -> None:
        if self._calm:
            return
        if fault.kind is FaultKind.CRASH and fault.after:
            self.armed.setdefault(Moment(fault.after), []).append(fault)
            return
        if fault.duration_s and fault.kind not in (FaultKind.CRASH, FaultKind.PAUSE, FaultKind.QUORUM_LOST):
            self._active[index] = fault
            self.schedule(fault.duration_s, self._end, index)
            self.happen(str(fault))
            self.struck[fault.kind.value] += 1
            self._set_conditions()
            return
        if fault.kind is FaultKind.QUORUM_LOST:
            self._lose_quorum(fault)
            return
        if fault.kind is FaultKind.REROOT:
            self.struck[fault.kind.value] += 1
            self.reroot([self.everybody[number] for number in fault.peers])
            return
        for number in fault.peers:
            self._strike_peer(fault, self.everybody[number])

    def _end(self, index: int) -> None:
        fault = self._active.pop(index, None)
        if fault is not None and not self._calm:
            self.happen(f"over: {fault}")
            self._set_conditions()

    def _set_conditions(self) -> None:
        """The network and the machines as all faults that last make them; the youngest of a kind prevails."""
        self.network.calm()
        for peer in self.everybody:
            peer.cpu = 1.0
            if isinstance(peer, Liar):
                peer.lies.clear()
        for index in sorted(self._active):
            self._set_condition(self._active[index])

    def _set_condition(self, fault: Fault) -> None:
        network = self.network
        match fault.kind:
            case FaultKind.DELAY:
                network.delay_mean_s, network.delay_shape = fault.amount, DelayShape(fault.detail)
            case FaultKind.LOSS:
                network.loss = fault.amount
            case FaultKind.DUPLICATE:
                network.duplicate = fault.amount
            case FaultKind.UPLINK:
                for number in fault.peers or range(len(self.everybody)):
                    network.uplinks[number] = fault.amount
            case FaultKind.PARTITION:
                network.sides = fault.sides
            case FaultKind.ONE_WAY:
                network.cut.add((fault.peers[0], fault.peers[1]))
            case FaultKind.SLOW_CPU:
                for number in fault.peers:
                    self.everybody[number].cpu = fault.amount
            case FaultKind.LIE:
                for peer in (self.everybody[number] for number in fault.peers):
                    assert isinstance(peer, Liar), "only its liars lie in a cluster"
                    peer.lies.add(Lie(fault.detail))
                    self.checker.suspects.add(peer.identity.peer)
            case _:
                raise AssertionError(f"{fault} does not last")

    def _strike_peer(self, fault: Fault, peer: SimPeer) -> None:
        kind = fault.kind
        if kind is FaultKind.JOIN and peer in self.waiting:
            self._join(peer)
        elif kind is FaultKind.DRIFT:
            peer.drift(fault.amount)
        elif kind is FaultKind.CLOCK_JUMP:
            peer.wall_offset_s += fault.amount
        elif not peer.up:
            return
        elif kind is FaultKind.CRASH:
            self._crash(peer, fault)
        elif kind is FaultKind.PAUSE:
            peer.pause(fault.duration_s)
        elif kind is FaultKind.LEAVE and self._may_leave(peer):
            peer.leave()
        else:
            return
        if kind is not FaultKind.CRASH:
            self.happen(f"{kind.value} {peer.number}")
        self.struck[kind.value] += 1

    def strike_at(self, moment: Moment, peer: SimPeer) -> None:
        """The peer has come to a moment at which somebody is to crash."""
        faults = self.armed.get(moment)
        if faults and self.network.link(peer.number, peer.number).random() < 0.5:
            fault = faults.pop()
            if not faults:
                del self.armed[moment]
            self.struck[FaultKind.CRASH.value] += 1
            self._crash(peer, fault)

    def _back_up(self, fault: Fault) -> None:
        for number in fault.peers:
            peer = self.everybody[number]
            peer.backups[fault.at_s] = peer.disk.copy()

    def _crash(self, peer: SimPeer, fault: Fault) -> None:
        self.happen(f"crash {peer.number} {fault.detail} {fault.after}")
        fate = DiskFate(fault.detail or DiskFate.KEPT)
        if fate is DiskFate.BACKUP:
            self.checker.suspects.add(peer.identity.peer)
        peer.crash(fate, fault.at_s)
        near = [one for one in self.peers if one.up and self.network.connected(peer.number, one.number)]
        for other in near:
            if self.network.link(peer.number, other.number).random() < fault.amount:
                other.later(0.05, other.connection_reset, peer.identity.peer)
        self.schedule(fault.duration_s, self._restart, peer)

    def _restart(self, peer: SimPeer) -> None:
        if peer.left and self.counts_on(peer):
            peer.left = False  # a round that it took part in was certified after it went
        # Whoever the owner has stopped is started by the owner, and by nobody who finds it down meanwhile.
        if not peer.up and not peer.left and not peer.gone and peer is not self._at_owner:
            self.happen(f"restart {peer.number}")
            self.unsettle()
            peer.boot()

    def _count_staying(self) -> int:
        return len([peer for peer in self.peers if not peer.left and not peer.leaving and not peer.gone])

    def counts_on(self, peer: SimPeer) -> bool:
        """Whether any log has this peer among its voters, or somebody waits for it who does not know the log's end."""
        heads = [*self.checker.logs.ends(), *self._heads()]
        return any(peer.identity.peer in head.voters for head in heads)

    def _may_leave(self, peer: SimPeer) -> bool:
        if peer.leaving or self._count_staying() + len(self.waiting) <= self.cluster.peers_min:
            return False
        # Honest voters do not go before others have come: the liars would be too many of those who are left.
        stay = [
            one for one in self.peers if one is not peer and not one.leaving and one.number not in self.cluster.liars
        ]
        voters = self.checker.newest_head().voters
        honest = len([one for one in stay if one.identity.peer in voters])
        return not self.cluster.liars or honest > 2 * len(self.cluster.liars)

    def _join(self, peer: SimPeer) -> None:
        self.waiting.remove(peer)
        self.peers.append(peer)
        peer.boot()

    # -- calm ----------------------------------------------------------------------------------------------------

    def _begin_calm(self) -> None:
        self.happen("calm")
        self._calm = True
        self._active.clear()
        self.armed.clear()
        self._set_conditions()
        self.network.empty_queues()
        while self._count_staying() < self.cluster.peers_min and self.waiting:
            self._join(self.waiting[0])
        for peer in self.peers:
            peer.paused_until_s = 0.0
            peer.wake()
        self.unsettle()
        self._tend_calm()

    def _tend_calm(self) -> None:
        """A round that was voted for earlier may still be certified, and count on a peer that has gone since."""
        for peer in self.peers:
            self._restart(peer)
        self.schedule(TEND_PERIOD_S, self._tend_calm)

    def unsettle(self) -> None:
        """Somebody came or went: presences must tell everybody before it counts how many attempts a round takes."""
        self._settled_s = max(self._settled_s, self.now + self.manifest.rounds.presence_timeout_s)

    def _run_calm_rounds(self) -> None:
        limit = self.now + CALM_LIMIT_S
        while True:
            # Rounds in which nobody has made an attempt before all was settled.
            while self.now < self._settled_s:
                self._run_until(self._settled_s, None)
            settled_s = self._settled_s
            first = max(peer.core.round for peer in self.peers if peer.up) + 1
            goal = first + CALM_ROUNDS - 1
            self._run_until(limit, partial(self._is_done, goal, settled_s))
            if self._settled_s == settled_s:
                break
        if self._late(goal):
            states = [f"{peer.number}: {peer.core.view()}" for peer in self.peers if peer.up]
            detail = f"peers {self._late(goal)} short of round {goal}\n" + "\n".join(states)
            raise broken("rounds commit after faults stop", detail)
        self._check_calm(first, goal)

    def _is_done(self, goal: int, settled_s: float) -> bool:
        return self._settled_s > settled_s or not self._late(goal)

    def _late(self, goal: int) -> list[int]:
        return [peer.number for peer in self.peers if peer.up and peer.core.head.round < goal]

    def _check_calm(self, first: int, last: int) -> None:
        """After faults stop, a round needs at most two attempts."""
        newest = max(self._heads(), key=lambda head: head.round)
        for head in self.checker.logs.back_from(newest):
            attempt = self.checker.results[head.digest]
            # A voter that has forgotten its votes and that every quorum needs goes on there: it counts anew.
            if first <= head.round <= last and attempt % FRESH_ATTEMPT >= ATTEMPTS_IN_CALM:
                raise broken("two attempts in calm", f"round {head.round} took attempt {attempt}")
            if head.round < first:
                break

    # -- more than one log -----------------------------------------------------------------------------------------

    def _lose_quorum(self, fault: Fault) -> None:
        """So many voters die that the others are no quorum. One voter is left, or only the owner could help."""
        voters = self.checker.newest_head().voters
        doomed = [peer for peer in (self.everybody[number] for number in fault.peers) if peer.identity.peer in voters]
        doomed = doomed[: min(len(voters) // 2 + 1, len(voters) - 1)]
        for_good = not fault.duration_s
        if for_good and self._count_staying() - len(doomed) + len(self.waiting) < self.cluster.peers_min:
            return
        self.struck[fault.kind.value] += 1
        for peer in doomed:
            peer.gone = peer.gone or for_good
            if peer.up:
                self._crash(peer, fault)

    def reroot(self, named: list[SimPeer]) -> None:
        """The owner stops a peer that holds the newest round, signs there who votes, and starts it again."""
        there = [peer for peer in self.peers if peer.up and not peer.leaving and peer.world.now >= peer.paused_until_s]
        if not there or self._at_owner is not None:
            return
        holder = max(there, key=lambda peer: (peer.core.head.round, -peer.number))
        voters = [peer for peer in there if peer in named] or [holder]
        self.happen(f"the owner names {','.join(str(peer.number) for peer in voters)} at {holder.number}")
        holder.crash()
        self._at_owner = holder
        self.schedule(1.0, self._sign_reroot, holder, tuple(peer.identity.peer for peer in voters))

    def _sign_reroot(self, holder: SimPeer, voters: tuple[PeerId, ...]) -> None:
        self._at_owner = None
        if not holder.up:
            sign_reroot(holder, self.owner, voters)
            self._restart(holder)

    def _heads(self) -> list[Head]:
        """Where everybody is who is up."""
        return [peer.core.head for peer in self.peers if peer.up]

    def _come_together(self) -> None:
        """Everybody comes to one log, and it has a quorum. What lived is compared with it in the end."""
        self._lived = [self.checker.logs.heads[head.digest] for head in self._heads()]
        self._tend_owner()
        self._run_until(self.now + CALM_LIMIT_S, self._is_together)
        if not self._is_together():
            states = [f"{peer.number}: {peer.core.head.round} {peer.core.view()}" for peer in self.peers if peer.up]
            raise broken("all peers come to one log", "\n".join(states))

    def _is_together(self) -> bool:
        heads = self._heads()
        newest = max(heads, key=lambda head: head.round)
        return self.checker.logs.is_one(heads) and self._has_quorum(newest)

    def _has_quorum(self, head: Head) -> bool:
        staying = [peer for peer in head.voters if self.by_id[peer].up]
        return oracle.is_quorum(len(staying), len(head.voters), self.cluster.quorum)

    def _tend_owner(self) -> None:
        """Where the peers that are left cannot go on by themselves, the owner speaks."""
        heaviest = self.checker.logs.heaviest(self._heads())
        left = [self.by_id[peer].core for peer in heaviest.voters if self.by_id[peer].up]
        # They declare where one of them knows that there was a quorum once.
        remain = any(core.has_seen_quorum for core in left) and bool(self.cluster.reroot_after_s)
        if not remain and not self._has_quorum(heaviest):
            self.reroot([peer for peer in self.peers if peer.up])
        self.schedule(OWNER_LOOKS_S, self._tend_owner)


if __name__ == "__main__":
    from tests.sim.campaign import main

    sys.exit(main())
