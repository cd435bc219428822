"""The owner's decrees from peer to peer, for those who cannot compare ledgers with each other yet.

A peer that waits to be admitted, or that was away while others were admitted, hears of it only from peers that may be
strangers to it. So everybody hands out the owner's chain, and takes from a stranger nothing else: each decree proves
itself by the owner's signature.

Invariant: an answer is bounded by its message; what is taken is of the owner's permanent chain.
"""

from shoal.crdt.entries import decode_batch_untrusted, encode_batch
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.kinds import EntryId
from shoal.crdt.ledger import Ledger
from shoal.node.control import ControlPlane
from shoal.node.ledger_sync import LedgerSync
from shoal.protocol.admission import GetDecrees
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import LedgerEntries, decode_message_untrusted, encode_message

DECREES_PER_ANSWER = 128
ANSWER_BYTES_MAX = 128 * 1024
PAGES_MAX = 9  # in one go; of decrees about peers that is the whole chain


def list_decrees(ledger: Ledger, first: int) -> LedgerEntries:
    """The answer to GetDecrees."""
    chain = list_chain(ledger)
    batches: list[bytes] = []
    held: set[EntryId] = set()
    for entry_id in chain[first : first + DECREES_PER_ANSWER]:
        if entry_id not in held:
            batch = ledger.prove(entry_id)
            held.update(batch.ids)
            batches.append(encode_batch(batch))
            if sum(map(len, batches)) > ANSWER_BYTES_MAX:
                break
    return LedgerEntries(payload=b"", batches=tuple(batches))


def list_newest_decrees(ledger: Ledger) -> LedgerEntries:
    """As much of the end of the owner's chain as an answer holds; who has missed no more than that can take it in."""
    return list_decrees(ledger, max(0, len(list_chain(ledger)) - DECREES_PER_ANSWER))


async def ask_decrees(control: ControlPlane, swarm: bytes, owner: PeerId, ledger: LedgerSync, peer: PeerId) -> bool:
    """Take in the decrees that this peer knows and the own ledger does not; whether there were any. Raises
    PeerUnreachable, RequestRefused, or ProtocolError for an answer that no honest peer gives."""
    found = False
    for _ in range(PAGES_MAX):
        question = GetDecrees(first=len(list_chain(ledger.ledger)))
        answer = decode_message_untrusted(swarm, await control.request(peer, encode_message(swarm, question)))
        if not isinstance(answer, LedgerEntries):
            raise ProtocolError(Refusal.UNKNOWN_TYPE, f"{type(answer).__name__} is no answer to GetDecrees")
        for raw in answer.batches:
            batch = decode_batch_untrusted(raw)
            if (batch.author, batch.era) != (owner, PERMANENT_ERA):
                raise ProtocolError(Refusal.UNKNOWN_TYPE, "entries that are no decrees of the owner")
        if not await ledger.take(answer):
            return found
        found = True
    return found


def list_chain(ledger: Ledger) -> list[EntryId]:
    """The owner's chain, oldest first."""
    chain: list[EntryId] = []
    name = ledger.standing.last_decree
    while name is not None and (entry := ledger.get(name)) is not None:
        chain.append(name)
        name = entry.prev
    return chain[::-1]
