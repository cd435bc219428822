"""Drills: in a world without chance one peer that is no proposer dies, at a moment that the seed draws.

What a death may cost is bounded far tighter than the random world can tell: no new attempt, nothing sent again but the
parts that the dead peer owned, and no more time than the deadline for whoever is silent.
"""

import random
from collections import Counter
from collections.abc import Sized

from shoal.protocol.effects import Effect, Planned, SendPart
from tests.sim.checkers import broken
from tests.sim.peer import SimPeer
from tests.sim.stage import Stage

DEEDS_MAX = 16
SLACK_S = 2.0


def count_sent_again(stage: Stage) -> Counter[int]:
    """How often each part of a contribution went out again, to another owner or to the same."""
    sent: set[tuple[int, int]] = set()
    again: Counter[int] = Counter()
    for deed in stage.deeds:
        effect = deed.effect
        if isinstance(effect, SendPart):
            key = (deed.peer.number, effect.part)
            again[effect.part] += key in sent
            sent.add(key)
    return +again


class Drill:
    """One death in round 1."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.stage = Stage(peers=rng.randint(4, 6), parts=6)
        self.victim = rng.choice([self.stage.name(peer) for peer in self.stage.peers if self.stage.name(peer) != "ann"])
        self._noticed = rng.random() < 0.5
        self._deeds_left = rng.randint(1, DEEDS_MAX)
        self._planned_s: float | None = None
        self.died_s: float | None = None

    @property
    def results(self) -> Sized:
        """The certified rounds."""
        return self.stage.checker.results

    def run(self) -> None:
        """Round 1, with the death in it if it comes to that; raises InvariantBroken."""
        stage = self.stage
        stage.after(self._is_moment, self._die)
        try:
            stage.run_to_round(1)
        except AssertionError as error:
            raise broken("a death costs one time-out", "the round is never certified") from error
        attempt = stage.certificate(1).attempt
        if attempt:
            raise broken("a death costs one time-out", f"{self.victim}'s cost {attempt} attempts")
        first = stage.first_plans()[0]
        owned = {part for part in range(6) if stage.owner_of(part, first) == self.victim}
        if not owned.issuperset(count_sent_again(stage)):
            raise broken("only what a dead peer owned is sent again", f"{count_sent_again(stage)}, not {owned}")
        self._check_time()

    def _is_moment(self, peer: SimPeer, effect: Effect) -> bool:
        if isinstance(effect, Planned):
            self._planned_s = self.stage.now
        if self._planned_s is None or self.stage.name(peer) != self.victim:
            return False
        self._deeds_left -= 1
        return self._deeds_left == 0

    def _die(self, peer: SimPeer) -> None:
        self.died_s = self.stage.now
        self.stage.kill(peer, self._noticed)

    def _check_time(self) -> None:
        if self.died_s is None:
            return
        rules = self.stage.manifest.rounds
        # Unnoticed, the dead peer is first waited for as an owner, who waits for its slowest sender; its successor then
        # waits for it as a sender.
        limit_s = SLACK_S if self._noticed else SLACK_S + rules.owner_timeout_s + 2 * rules.sender_timeout_s
        took_s = self.stage.now - self.died_s
        if took_s > limit_s:
            raise broken("a death costs one time-out", f"{self.victim}'s cost {took_s:.1f} s")
