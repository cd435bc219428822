"""Members that lie: an honest core whose words are falsified as they leave, and words that no core would say.

Lies are well-formed: what does not decode never reaches a core, and the decoder has tests of its own.
"""

import dataclasses
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from shoal.protocol import messages
from shoal.protocol.attendance import INTERVAL_ROUNDS_MAX, Attendance
from shoal.protocol.contribution import Frozen
from shoal.protocol.effects import Reduce
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.manifest import Manifest
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    SCHEMA,
    Contribution,
    Lock,
    Plan,
    Prepare,
    Presence,
    Promise,
    Proposal,
    Ready,
    Result,
    RosterEntry,
    Vote,
    contribution_root,
    digest_record,
    sign_message,
)
from shoal.protocol.proposer import list_weights
from tests.sim import oracle
from tests.sim.faults import Lie
from tests.sim.peer import SimPeer

if TYPE_CHECKING:
    from tests.sim.world import World

HEARD_MAX = 200  # messages that a liar can replay or distort
LIES_PER_BEAT = 3
GREEDY_TOKENS = 2**62
EDGES = (0, 1, 2, 3, 7, 255, 2**16 - 1, 2**31, 2**32 - 2, 2**32 - 1)
_NAN = np.array([np.nan], "<f4").tobytes()


class Liar(SimPeer):
    """Lies as long as `lies` says so."""

    def __init__(self, world: "World", number: int, identity: Identity, manifest: Manifest, swarm: bytes) -> None:
        super().__init__(world, number, identity, manifest, swarm)
        self.lies: set[Lie] = set()
        self.heard: deque[ROUND_MESSAGES] = deque(maxlen=HEARD_MAX)

    # -- contributions and results -------------------------------------------------------------------------------

    def _word(self, frozen: Frozen) -> tuple[Frozen, Ready]:
        if Lie.NAN_SCALE in self.lies:
            part = self.rng.randrange(len(frozen.encoded))
            encoded = tuple(
                memoryview(_NAN + raw[4:]) if index == part else raw for index, raw in enumerate(frozen.encoded)
            )
            digests = tuple(blake3(raw).digest() for raw in encoded)
            frozen = replace(frozen, encoded=encoded, digests=digests, root=contribution_root(digests))
        frozen, said = super()._word(frozen)
        if Lie.GREEDY_WEIGHT in self.lies:
            said = replace(said, tokens=GREEDY_TOKENS, steps=1)
            if said.attendance.intervals:
                seldom = Attendance(intervals=1, interval_rounds=min(INTERVAL_ROUNDS_MAX, said.round - 1))
                said = replace(said, attendance=seldom)
        if Lie.STALE_BASE in self.lies:
            said = replace(said, base_root=blake3(said.base_root).digest())
        return frozen, said

    def _part_bytes(self, frozen: Frozen, part: int) -> bytes:
        raw = super()._part_bytes(frozen, part)
        if Lie.WRONG_PART in self.lies and self.rng.random() < 0.7:
            return raw[:-1] + bytes([raw[-1] ^ 1])
        if Lie.WRONG_LENGTH in self.lies and self.rng.random() < 0.5:
            return raw[:-1]
        return raw

    def _reduce(self, effect: Reduce) -> None:
        try:
            super()._reduce(effect)
        except ProtocolError:
            return  # it cannot even reduce its own part

    def _reduced(self, effect: Reduce, raw: bytes, digest: bytes) -> None:
        first, end = oracle.find_span(self.manifest, effect.round, effect.part)
        if Lie.GARBAGE_RESULT in self.lies:
            raw = _NAN + raw[4:]
        elif Lie.WRONG_RESULT in self.lies:
            codec = self.manifest.rounds.codec_out
            raw = oracle.encode(codec, oracle.decode(codec, raw, end - first) * np.float32(-3))
        if (false := blake3(raw).digest()) != digest:
            self.world.checker.lies.add(false)
        super()._reduced(effect, raw, false)

    # -- words ---------------------------------------------------------------------------------------------------

    def _say(self, peer: PeerId, message: ROUND_MESSAGES) -> None:
        if peer != self.identity.peer:
            message = self._falsify(message)
            self.heard.append(message)
        super()._say(peer, message)

    def _falsify(self, message: ROUND_MESSAGES) -> ROUND_MESSAGES:
        """What this recipient is told."""
        if self.rng.random() < 0.4:
            return message
        if isinstance(message, Plan):
            return self._falsify_plan(message)
        if isinstance(message, Proposal) and Lie.TWO_PROPOSALS in self.lies:
            return replace(message, result=self._other_result(message.result))
        if isinstance(message, Contribution) and Lie.WRONG_LENGTH in self.lies:
            return replace(message, digests=self.rng.choice((message.digests[:1], message.digests * 2)))
        return message

    def _falsify_plan(self, plan: Plan) -> Plan:
        if Lie.TWO_PLANS in self.lies and len(plan.roster) > 1:
            signed = [entry.signed for entry in plan.roster]
            del signed[self.rng.randrange(len(signed))]
            weights = list_weights(tuple(signed), self.manifest.rounds.weights)
            roster = tuple(RosterEntry(signed=one, weight=weight) for one, weight in zip(signed, weights, strict=True))
            able = [index for index, one in enumerate(signed) if one.ready.owns]
            if able:
                plan = replace(plan, roster=roster, owners=tuple(self.rng.choice(able) for _ in plan.owners))
        if Lie.PLANNED_WEIGHT in self.lies:
            greedy = replace(plan.roster[0], weight=0.9)
            plan = replace(plan, roster=(greedy, *plan.roster[1:]))
        if Lie.WRONG_LENGTH in self.lies:
            plan = replace(plan, owners=(*plan.owners, plan.owners[0]))
        return sign_message(self.identity, self.swarm, plan)

    def _other_result(self, result: Result) -> Result:
        choices = [replace(result, voters=result.voters[::-1]), replace(result, voters=result.voters[:1])]
        choices.append(replace(result, voters=(self.identity.peer,)))
        if len(result.parts) > 1:
            choices.append(replace(result, parts=(result.parts[1], *result.parts[1:])))
            choices.append(replace(result, parts=result.parts[::-1]))
        return self.rng.choice(choices)

    def take(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        self.heard.append(message)
        if Lie.TWO_VOTES in self.lies and sender != self.identity.peer:
            self._agree(message, sender)
        super().take(message, sender)

    def _agree(self, message: ROUND_MESSAGES, sender: PeerId) -> None:
        """Promise everything to everybody, forget it, and vote for whatever is proposed."""
        if isinstance(message, Prepare):
            promise = Promise(round=message.round, attempt=message.attempt, accepted_attempt=0, accepted=None)
            super()._say(sender, promise)
        if isinstance(message, Proposal):
            result = message.result
            digest = digest_record(result)
            where: dict[str, Any] = {"voter": self.identity.peer, "round": result.round, "attempt": message.attempt}
            for one in (digest, blake3(digest).digest()):
                super()._say(sender, sign_message(self.identity, self.swarm, Lock(**where, result_digest=one)))
                super()._say(sender, sign_message(self.identity, self.swarm, Vote(**where, result_digest=one)))

    # -- words that no core would say ------------------------------------------------------------------------------

    def _announce(self) -> None:
        super()._announce()
        others = [peer for peer in self.world.by_id if peer != self.identity.peer]
        for _ in range(LIES_PER_BEAT if self.heard else 0):
            if Lie.REPLAY in self.lies:
                super()._say(self.rng.choice(others), self.rng.choice(self.heard))
            if Lie.NONSENSE in self.lies:
                nonsense = self._distort(self.rng.choice(self.heard))
                if nonsense is not None:
                    super()._say(self.rng.choice(others), nonsense)

    def _presence(self) -> Presence:
        presence = super()._presence()
        if Lie.STALE_BASE in self.lies and self.rng.random() < 0.5:
            far = presence.head_round + self.rng.choice((0, 1, 5))
            return replace(presence, head_round=far, state_root=blake3(presence.state_root).digest())
        return presence

    def _distort(self, message: ROUND_MESSAGES) -> ROUND_MESSAGES | None:
        """The message with a field or two changed, signed anew; None when it would not decode."""
        changed = self._distort_record(message)
        if type(changed) in messages._DOMAINS and self.rng.random() < 0.7:
            changed = sign_message(self.identity, self.swarm, changed)
        try:
            decoded: ROUND_MESSAGES = SCHEMA.decode_untrusted(SCHEMA.encode(changed))
        except (ProtocolError, OverflowError):
            return None
        return decoded

    def _distort_record(self, record: Any) -> Any:
        fields = dataclasses.fields(record)
        chosen = self.rng.sample(fields, min(len(fields), self.rng.choice((1, 1, 2))))
        changes = {field.name: self._distort_value(getattr(record, field.name)) for field in chosen}
        return replace(record, **changes)

    def _distort_value(self, value: Any) -> Any:
        rng = self.rng
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return rng.choice((value + 1, max(0, value - 1), rng.choice(EDGES)))
        if isinstance(value, float):
            return rng.choice((0.0, -value, value * 1e6, 1.0))
        if isinstance(value, bytes):
            return rng.choice((rng.randbytes(len(value)), self.identity.peer[: len(value)], bytes(len(value))))
        if isinstance(value, tuple) and value:
            index = rng.randrange(len(value))
            item = value[index]
            other = self._distort_record(item) if dataclasses.is_dataclass(item) else self._distort_value(item)
            changed = (*value[:index], other, *value[index + 1 :])
            return rng.choice((changed, changed, value[:-1], (*value, value[0]), value[::-1]))
        if dataclasses.is_dataclass(value):
            return rng.choice((self._distort_record(value), value))
        return value
