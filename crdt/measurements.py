"""What members have measured of certified bases on their held-out data: tags of the name `held-out`, for people only.

A measurement is one writer's own word on its own data, and nobody can check the figure. Who may speak is checked: of a
round only the one whom its certificate names as evaluator (`shoal.protocol.quorum.find_evaluator`), so nobody else's
tag is shown, whatever it says, and of one round there is one measurement.

Invariant: what is listed is a function of the ledger's state and the manifest's `evaluate_every`, the same at every
replica; nothing of the protocol reads it.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from shoal.crdt.fold import LedgerState
from shoal.crdt.kinds import TAG_REMOVALS_MAX, EntryId, Kind, TagBody
from shoal.crdt.ledger import Draft
from shoal.crdt.merge import Tag
from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate
from shoal.protocol.quorum import find_evaluator
from shoal.protocol.wire import DELTA_BYTES_MAX, Bound, decode_record_untrusted, encode_record

HELD_OUT_TAG = "held-out"
MEASUREMENTS_SHOWN_MAX = 16
MEASUREMENTS_KEPT_MAX = 16  # of one author; older ones it takes back
TAGS_READ_MAX = 2 * MEASUREMENTS_KEPT_MAX  # of one author: whoever writes more hides its own
# Of as many of the newest measured rounds certificates are read: tags for rounds that measured nothing cost no more.
ROUNDS_READ_MAX = 64
LOSS_NATS_MAX = 1_000_000
MEASUREMENT_BYTES_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """The value of a tag: the mean loss of the base that came of `round`, in nats a token, over `tokens` tokens."""

    round: Annotated[int, Bound(1, 2**63 - 1)]
    loss_nats: Annotated[float, Bound(-LOSS_NATS_MAX, LOSS_NATS_MAX)]
    tokens: Annotated[int, Bound(1, 2**63 - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What `author` says that it has measured."""

    author: PeerId
    held_out: HeldOutLoss


def is_sayable(held_out: HeldOutLoss) -> bool:
    """Whether others would read it: a loss that is not finite or beyond all bounds is nobody's business."""
    try:
        decode_record_untrusted(HeldOutLoss, encode_record(held_out))
    except ProtocolError:
        return False
    return True


def list_measurements(state: LedgerState, evaluate_every: int) -> tuple[Measurement, ...]:
    """Those of the newest rounds, the newest first, MEASUREMENTS_SHOWN_MAX at most."""
    by_round: dict[int, list[tuple[Tag, HeldOutLoss]]] = {}
    for tag, held_out in _list_said(state):
        if evaluate_every and held_out.round % evaluate_every == 0 and held_out.round in state.certificates:
            by_round.setdefault(held_out.round, []).append((tag, held_out))
    found: list[Measurement] = []
    for number in sorted(by_round, reverse=True)[:ROUNDS_READ_MAX]:
        evaluator = _find_evaluator(state.certificates[number], evaluate_every)
        # Whoever measured twice is taken by the tag with the greater entry id: any rule does that all replicas share.
        said = [(tag.entry, held_out) for tag, held_out in by_round[number] if tag.author == evaluator]
        if evaluator is not None and said:
            found.append(Measurement(author=evaluator, held_out=max(said, key=lambda one: one[0])[1]))
        if len(found) == MEASUREMENTS_SHOWN_MAX:
            break
    return tuple(found)


def draft_measurement(state: LedgerState, me: PeerId, held_out: HeldOutLoss) -> tuple[Draft, ...]:
    """What `me` writes to say it: the tag, and with it the end of its own ones that are too many, or of the round."""
    own = [(said.round, tag.entry) for tag, said in _list_said(state) if tag.author == me]
    older = sorted(one for one in own if one[0] != held_out.round)
    surplus = [entry for _, entry in older[: max(0, len(older) + 1 - MEASUREMENTS_KEPT_MAX)]]
    removed: list[EntryId] = [*(entry for number, entry in own if number == held_out.round), *surplus]
    drafts = [TagBody(name=HELD_OUT_TAG, value=encode_record(held_out), removes=())]
    if removed:
        drafts.append(TagBody(name="", value=b"", removes=tuple(removed[:TAG_REMOVALS_MAX])))
    return tuple(Draft(kind=Kind.TAG, body=body) for body in drafts)


def decode_measurement_untrusted(value: bytes) -> HeldOutLoss:
    """What a tag of the name HELD_OUT_TAG says; raises ProtocolError and nothing else."""
    return decode_record_untrusted(HeldOutLoss, value, MEASUREMENT_BYTES_MAX)


def _list_said(state: LedgerState) -> list[tuple[Tag, HeldOutLoss]]:
    """Of those who were in a certified round. What somebody else uses the name for is left out."""
    said, read = [], Counter[PeerId]()
    for tag in state.tags:
        if tag.name == HELD_OUT_TAG and tag.author in state.credit and read[tag.author] < TAGS_READ_MAX:
            read[tag.author] += 1
            with suppress(ProtocolError):
                said.append((tag, decode_measurement_untrusted(tag.value)))
    return said


@lru_cache(maxsize=2 * ROUNDS_READ_MAX)
def _find_evaluator(certificate: bytes, evaluate_every: int) -> PeerId | None:
    """Of a certificate that counts; to read one again each time the state changes is not cheap."""
    result = decode_record_untrusted(Certificate, certificate, DELTA_BYTES_MAX).result
    return find_evaluator(result, evaluate_every)
