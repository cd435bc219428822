"""The sum of the early rounds, for a ledger whose own log begins behind them.

Credit follows from certificates. Of rounds that nobody keeps any more it follows from what those have summed up who
were there (`ChainBase`), and no certificate names that sum. So it is taken on the word of voters of the own log's
newest round, each asked over a connection that proves who it is: of so many that one of them at least does not lie
(protocol.trail), all with the same digest. One honest voter has derived it from certificates, or has taken it in this
way itself.

Invariants: the sum ends with a round whose certificate is in the own log, with the same digest and the same voters;
nothing is taken of it before as many voters as are needed have named the same.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

from blake3 import blake3

from shoal.crdt.certified import ChainBase, decode_base_untrusted
from shoal.node.control import PeerUnreachable, RequestRefused
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId, short_peer_id
from shoal.protocol.messages import BASE_PIECE_BYTES_MAX, GetLedgerBase, LedgerBaseAnswer
from shoal.protocol.quorum import QuorumRule
from shoal.protocol.trail import Anchor, blocking_size
from shoal.protocol.wire import DELTA_BYTES_MAX

BASE_BYTES_MAX = 4 * DELTA_BYTES_MAX

log = logging.getLogger(__name__)

Ask = Callable[[PeerId, object], Awaitable[object]]


async def ask_for_base(
    ask: Ask, voters: Collection[PeerId], live: Collection[PeerId], rule: QuorumRule
) -> ChainBase | None:
    """What enough of the voters say, unchecked against the own log; None where too few of them say the same."""
    needed = blocking_size(len(voters), rule)
    asked = [peer for peer in voters if peer in live]
    if len(asked) < needed:
        return None
    answers = await asyncio.gather(*(_ask_piece(ask, peer, 0) for peer in asked))
    named: dict[tuple[int, bytes, int], list[PeerId]] = {}
    for peer, answer in zip(asked, answers, strict=True):
        if answer is not None and answer.round:
            named.setdefault((answer.round, answer.digest, answer.nbytes), []).append(peer)
    for (number, digest, nbytes), peers in sorted(named.items(), reverse=True):
        if len(peers) >= needed and nbytes <= BASE_BYTES_MAX:
            for peer in peers:
                base = await _fetch(ask, peer, digest, nbytes)
                if base is not None and base.round == number:
                    return base
    return None


def fits(base: ChainBase, anchor: Anchor | None) -> bool:
    """Whether the sum ends where the own log says that this round did."""
    return anchor is not None and (base.round, base.digest, base.voters) == (
        anchor.round,
        anchor.digest,
        anchor.voters,
    )


async def _ask_piece(ask: Ask, peer: PeerId, offset: int) -> LedgerBaseAnswer | None:
    try:
        answer = await ask(peer, GetLedgerBase(offset=offset))
        if not isinstance(answer, LedgerBaseAnswer):
            raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetLedgerBase")
    except (PeerUnreachable, RequestRefused, ProtocolError) as error:
        log.info("%s does not say what its ledger stands on: %s", short_peer_id(peer), error)
        return None
    return answer


async def _fetch(ask: Ask, peer: PeerId, digest: bytes, nbytes: int) -> ChainBase | None:
    raw = b""
    while len(raw) < nbytes:
        answer = await _ask_piece(ask, peer, len(raw))
        if answer is None or answer.digest != digest or not 0 < len(answer.piece) <= BASE_PIECE_BYTES_MAX:
            return None
        raw += answer.piece
    if blake3(raw).digest() != digest:
        return None
    try:
        return decode_base_untrusted(raw)
    except ProtocolError:
        return None
