"""What it costs two ledgers to become equal, in bytes of control messages."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from shoal.crdt.anti_entropy import ROUND_TRIPS_MAX, Conversation
from shoal.crdt.entries import Batch, decode_batch_untrusted
from shoal.crdt.key_set import KEY_END, KEY_FIRST
from shoal.crdt.kinds import Kind, RegisterBody
from shoal.crdt.ledger import Draft, Ledger, LedgerRules
from shoal.crdt.reconciliation import BATCHES_MAX, COMPARISON_BYTES_MAX, ENTRIES_BYTES_MAX, answer
from shoal.crdt.sketch import SALT_BYTES
from shoal.protocol.identity import Identity
from shoal.protocol.messages import LedgerEntries, Reconcile, decode_message_untrusted, encode_message

START_MS = 1_700_000_000_000
RULES = LedgerRules(swarm=b"s" * 32, owner=None, is_valid_snapshot=lambda *_: True)


def write_many(count: int) -> list[Batch]:
    """Batches of one entry, each by an author of its own, one a second: leases as the daemon writes them, which are the
    smallest entries there are, and so the hardest to find at a price in proportion to their size."""
    drafts = [Draft(kind=Kind.LEASE, body=RegisterBody(value=bytes(8)))]
    ledgers = (Ledger(identity=Identity(number.to_bytes(32, "big")), rules=RULES) for number in range(1, count + 1))
    return [ledger.write(drafts, START_MS + 1000 * number) for number, ledger in enumerate(ledgers)]


def fill(batches: Iterable[Batch]) -> Ledger:
    ledger = Ledger(identity=Identity(bytes(32)), rules=RULES)
    ledger.restore(batches)
    return ledger


@dataclass(slots=True)
class Cost:
    """What it took to compare: `frame_bytes` are those of all control messages, `entry_bytes` those of the batches in
    them."""

    conversations: int = 0
    round_trips: int = 0
    frame_bytes: int = 0
    entry_bytes: int = 0

    def send(self, message: Reconcile | LedgerEntries) -> None:
        """Put a message into a frame and take it out again, as the control plane does."""
        frame = encode_message(RULES.swarm, message)
        assert decode_message_untrusted(RULES.swarm, frame) == message
        assert len(message.payload) <= COMPARISON_BYTES_MAX
        self.frame_bytes += len(frame)
        if isinstance(message, LedgerEntries):
            sent = sum(map(len, message.batches))
            assert sent <= ENTRIES_BYTES_MAX
            assert len(message.batches) <= BATCHES_MAX
            self.entry_bytes += sent


def take(ledger: Ledger, batches: Iterable[bytes]) -> None:
    # Signatures are not the subject here: `restore` does not check them.
    ledger.restore(decode_batch_untrusted(raw) for raw in batches)


def converse(opener: Ledger, other: Ledger, cost: Cost, salt: bytes, round_trips_max: int = ROUND_TRIPS_MAX) -> bool:
    """One conversation; returns whether it came to its end."""
    conversation, is_settled = Conversation(opener, salt), False
    cost.conversations += 1
    for _ in range(round_trips_max):
        question = conversation.request
        if question is None:
            break
        cost.round_trips += 1
        cost.send(Reconcile(payload=question))
        response = answer(other, question)
        reply = LedgerEntries(payload=response.reply or b"", batches=response.batches)
        cost.send(reply)
        take(opener, reply.batches)
        lacking = conversation.go_on(reply.payload, len(reply.batches))
        if lacking:
            cost.send(LedgerEntries(payload=b"", batches=lacking))
            take(other, lacking)
        if conversation.request is None:
            # What ended it: nothing to add, or the last round trip that it had.
            is_settled = not reply.payload or answer(opener, reply.payload).reply is None
    return is_settled


def compare(opener: Ledger, other: Ledger, seed: int = 0, round_trips_max: int = ROUND_TRIPS_MAX) -> Cost:
    """Conversations until one comes to its end."""
    cost, entropy = Cost(), random.Random(seed)
    while not converse(opener, other, cost, entropy.randbytes(SALT_BYTES), round_trips_max):
        assert cost.conversations < 100, "it comes to an end"
    return cost


def list_keys(ledger: Ledger) -> list[bytes]:
    return list(ledger.keys.iterate(KEY_FIRST, KEY_END))


LAYOUTS = ("end", "stretch", "stretches", "spread")
MISSED_BY = ("opener", "other", "both")


def choose_missing(layout: str, entries: int, count: int, entropy: random.Random) -> list[int]:
    """Which entries not both have: the newest, a stretch of history, stretches of it, or any."""
    match layout:
        case "end":
            return list(range(entries - count, entries))
        case "stretch":
            first = entropy.randrange(entries - count)
            return list(range(first, first + count))
        case "stretches":
            length = max(1, count // 5)
            starts = entropy.sample(range(0, entries - length, length), -(-count // length))
            return list(islice((start + index for start in starts for index in range(length)), count))
        case _:
            return entropy.sample(range(entries), count)


def make_pair(
    pool: list[Batch], layout: str, count: int, missed_by: str, entropy: random.Random
) -> tuple[Ledger, Ledger, list[int]]:
    """The opener's ledger and the other one, which together hold the pool, and the numbers of what not both have."""
    missing = choose_missing(layout, len(pool), count, entropy)
    of_opener = {"opener": set(missing), "other": set(), "both": set(missing[::2])}[missed_by]
    of_other = set(missing) - of_opener
    opener, other = (
        fill(batch for number, batch in enumerate(pool) if number not in misses) for misses in (of_opener, of_other)
    )
    return opener, other, missing
