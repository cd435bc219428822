"""The simulated world: one heap of (time, sequence, action), one seed, many peers.

    python -m tests.sim.world --seed 7            replay one seed
    python -m tests.sim.world --rounds 20000      many seeds, new ones each run, printed

Each seed draws its fault rates, runs a fault phase, then a calm phase in which rounds must be certified again.
"""

import argparse
import hashlib
import heapq
import itertools
import random
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.protocol import identity as identity_module
from shoal.protocol.aggregators import WeightedPart
from shoal.protocol.effects import AttemptFailed, Note, Reduce
from shoal.protocol.identity import Identity
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import Draft, Manifest, Rounds, Task, genesis_head, make_manifest
from shoal.protocol.messages import digest_record
from shoal.protocol.replica import Replica, make_reduction
from tests.sim.checkers import Checker, InvariantBroken, broken
from tests.sim.network import Network, Rates, draw_rates
from tests.sim.peer import SimPeer

PEERS_MAX = 9
FAULT_PHASE_S = 150.0
CALM_LIMIT_S = 400.0
CALM_ROUNDS = 3
RULES = Rounds(
    peers_min=2,
    grace_s=2.0,
    part_elements=256,
    plan_timeout_s=2.0,
    sender_timeout_s=3.0,
    owner_timeout_s=5.0,
    exchange_timeout_s=15.0,
    commit_timeout_s=5.0,
    presence_period_s=2.0,
    presence_timeout_s=7.0,
)


def make_world_manifest(founders: tuple[Identity, ...]) -> Manifest:
    layout = Layout(tensors=(TensorSpec(name="w", shape=(900,), init="uniform", std=0.02),))
    draft = Draft(name="sim", task=Task(kind="sim"), seed=1, rounds=RULES)
    return make_manifest(draft, layout, founders[0].peer, tuple(one.peer for one in founders))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    rounds: int
    attempts_failed: Counter[str]
    participants: float
    virtual_s: float
    trace: str


class World:
    def __init__(self, seed: int, rates: Rates | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.rng = random.Random(seed)
        self.rates = rates or draw_rates(self.rng)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._trace = hashlib.blake2b(digest_size=16)
        self.failures: Counter[str] = Counter()
        self.happenings: list[str] = []
        self.network = Network(random.Random(f"{seed}/network"), self.schedule)
        identities = [Identity(self.rng.randbytes(32)) for _ in range(PEERS_MAX)]
        founders = tuple(identities[: self.rng.choice((1, 1, 2, 3, 4))])
        manifest = make_world_manifest(founders)
        swarm = digest_record(manifest)
        blank = Replica(manifest, *(np.zeros(manifest.layout.elements, np.float32) for _ in range(2)))
        self.checker = Checker(manifest, swarm, genesis_head(manifest, swarm, blank.reset()))
        everyone = [SimPeer(self, number, one, manifest, swarm) for number, one in enumerate(identities)]
        self.by_id = {peer.identity.peer: peer for peer in everyone}
        first = max(len(founders), self.rng.randint(2, 6))
        self.peers = everyone[:first]
        self.waiting = everyone[first:]

    def schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay_s, next(self._sequence), action))

    def note(self, peer: SimPeer, effect: Note) -> None:
        self._record(f"{peer.number} {type(effect).__name__} {effect.round}")
        if isinstance(effect, AttemptFailed):
            self.failures[effect.reason.value] += 1

    def happen(self, text: str) -> None:
        self.happenings.append(f"{self.now:9.3f} {text}")
        self._record(text)

    def _record(self, text: str) -> None:
        self._trace.update(f"{self.now:.6f} {text}\n".encode())

    def reduce(self, manifest: Manifest, effect: Reduce, encoded: list[bytes]) -> bytes:
        """The production reduction of one part."""
        first, end = manifest.part_range(effect.part)
        pairs = zip(encoded, effect.members, strict=True)
        parts = [WeightedPart(encoded=raw, weight=entry.weight) for raw, entry in pairs]
        return bytes(make_reduction(manifest).reduce_part(parts, end - first))

    def run(self) -> Outcome:
        """The fault phase, then the calm phase; raises InvariantBroken."""
        for peer in self.peers:
            self.schedule(self.rng.uniform(0.0, 3.0), peer.boot)
        self.network.rates = self.rates
        self.schedule(1.0, self._faults)
        self._run_until(FAULT_PHASE_S, None)
        self._begin_calm()
        # Once presences have told everybody who is there; then, rounds in which nobody has made an attempt yet.
        self._run_until(self.now + RULES.presence_timeout_s, None)
        first_calm = max(peer.core.round for peer in self.peers if peer.up) + 1
        goal = first_calm + CALM_ROUNDS - 1
        limit = self.now + CALM_LIMIT_S
        self._run_until(limit, lambda: all(peer.core.head.round >= goal for peer in self.peers if peer.up))
        late = [peer.number for peer in self.peers if peer.up and peer.core.head.round < goal]
        if late:
            states = [f"{peer.number}: {peer.core.view()}" for peer in self.peers if peer.up]
            raise broken("rounds commit after faults stop", f"peers {late} short of round {goal}\n" + "\n".join(states))
        self._check_calm(first_calm, goal)
        counts = [count for count in self.checker.participants.values() if count]
        return Outcome(
            seed=self.seed,
            rounds=len(self.checker.results),
            attempts_failed=self.failures,
            participants=sum(counts) / max(len(counts), 1),
            virtual_s=self.now,
            trace=self._trace.hexdigest(),
        )

    def _run_until(self, end: float, done: Callable[[], bool] | None) -> None:
        count = 0
        while self._heap and self._heap[0][0] <= end:
            self.now, _, action = heapq.heappop(self._heap)
            action()
            count += 1
            if done and count % 64 == 0 and done():
                return
        if not (done and self._heap):
            self.now = end

    def _faults(self) -> None:
        if self.now >= FAULT_PHASE_S:
            return
        self.schedule(1.0, self._faults)
        for text in self.network.step([peer.number for peer in self.peers], 1.0):
            self.happen(text)
        for peer in list(self.peers):
            if peer.up and self.rng.random() < self.rates.crash_per_s:
                self._crash(peer)
            elif peer.up and self.rng.random() < self.rates.pause_per_s:
                peer.paused_until_s = self.now + self.rng.uniform(1.0, 60.0)
                self.happen(f"pause {peer.number} until {peer.paused_until_s:.1f}")
            elif self._may_leave(peer) and self.rng.random() < self.rates.leave_per_s:
                self.happen(f"leave {peer.number}")
                peer.leave()
        if self.waiting and self.rng.random() < self.rates.join_per_s:
            self._join()

    def _count_staying(self) -> int:
        return len([peer for peer in self.peers if not peer.left and not peer.leaving])

    def _may_leave(self, peer: SimPeer) -> bool:
        return peer.up and not peer.leaving and self._count_staying() + len(self.waiting) > RULES.peers_min

    def _join(self) -> None:
        peer = self.waiting.pop(0)
        self.peers.append(peer)
        self.happen(f"join {peer.number}")
        peer.boot()

    def _crash(self, peer: SimPeer) -> None:
        self.happen(f"crash {peer.number}")
        peer.crash()
        for other in self.peers:
            if other is not peer and self.network.connected(peer.number, other.number) and self.rng.random() < 0.7:
                other.later(0.05, lambda other=other: other.connection_reset(peer.identity.peer))
        self.schedule(self.rng.expovariate(1.0 / self.rates.restart_s), lambda: self._restart(peer))

    def _restart(self, peer: SimPeer) -> None:
        if peer.left and peer.identity.peer in self.checker.newest_head().voters:
            peer.left = False  # a round that it took part in was certified after it went
        if not peer.up and not peer.left:
            self.happen(f"restart {peer.number}")
            peer.boot()

    def _begin_calm(self) -> None:
        self.happen("calm")
        self.network.calm()
        while self._count_staying() < RULES.peers_min and self.waiting:
            self._join()
        for peer in self.peers:
            peer.paused_until_s = 0.0
        self._tend_calm()

    def _tend_calm(self) -> None:
        """A round that was voted for earlier may still be certified, and count on a peer that has gone since."""
        for peer in self.peers:
            self._restart(peer)
        self.schedule(5.0, self._tend_calm)

    def _check_calm(self, first: int, last: int) -> None:
        """After faults stop, a round needs at most two attempts."""
        for number in range(first, last + 1):
            if self.checker.attempts[number] > 1:
                raise broken("two attempts in calm", f"round {number} took attempt {self.checker.attempts[number]}")


def verify_once() -> None:
    """Ed25519 verification is a pure function; a message that reaches eight peers is verified once."""
    import functools

    from shoal.protocol import messages

    cached = functools.lru_cache(maxsize=1 << 14)(identity_module.verify_signature)
    messages.verify_signature = cached  # type: ignore[assignment]


def main() -> int:
    parser = argparse.ArgumentParser(description="simulate rounds under faults")
    parser.add_argument("--seed", type=int, help="replay this seed and print what happened")
    parser.add_argument("--rounds", type=int, default=5000, help="simulate at least this many rounds over many seeds")
    parser.add_argument("--first-seed", type=int, help="the first of the seeds; default: random")
    options = parser.parse_args()
    verify_once()
    if options.seed is not None:
        world = World(options.seed)
        try:
            outcome = world.run()
        finally:
            print("\n".join(world.happenings))
        print(outcome)
        return 0
    return run_many(options.rounds, secrets.randbits(32) if options.first_seed is None else options.first_seed)


def run_many(rounds_min: int, first_seed: int) -> int:
    """Seeds from `first_seed` on until enough rounds are simulated; 1 when an invariant broke."""
    started = time.monotonic()
    rounds, failed, participants = 0, Counter[str](), []
    for seed in itertools.count(first_seed):
        try:
            outcome = World(seed).run()
        except (InvariantBroken, AssertionError, KeyError) as error:
            print(f"FAILED seed {seed}: {error}\nreplay: make sim SEED={seed}", file=sys.stderr)
            return 1
        rounds += outcome.rounds
        failed += outcome.attempts_failed
        participants.append(outcome.participants)
        if rounds >= rounds_min:
            break
    seconds = time.monotonic() - started
    print(f"{rounds} rounds, seeds {first_seed}..{seed}, {rounds / seconds * 60:.0f} rounds/min, 0 invariants broken")
    print(f"participants a round: {sum(participants) / len(participants):.2f}; failed attempts: {dict(failed)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
