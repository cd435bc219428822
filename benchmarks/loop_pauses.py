"""How long the daemon's event loop stands still for the largest messages that it answers or judges.

    python -m benchmarks.loop_pauses [--parts 1000] [--entries 10000] [--json FILE]

A timer on the loop runs every millisecond; the longest time between two of its runs, less that millisecond, is the
pause. Judged are a proposal where members may lie (its evidence has a signature for each part, and a READY for each of
64 members), and answers of a ledger that is compared with another one, from which nearly all or half of it differs.
Each is done on the loop, and in the way of the daemon.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from shoal.crdt.anti_entropy import Conversation
from shoal.crdt.ledger import Ledger
from shoal.crdt.reconciliation import Answer, answer
from shoal.crdt.sketch import SALT_BYTES
from shoal.node.bench.commands import describe_machine
from shoal.node.verification import Verification
from shoal.protocol.identity import Identity, PeerId, forget_signatures
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    PartDone,
    Proposal,
    Ready,
    decode_message_untrusted,
    digest_roster,
    encode_message,
    sign_message,
    sign_ready,
)
from shoal.protocol.proposer import check_evidence, make_evidence, make_plan, make_result
from shoal.protocol.quorum import Authority, Head, QuorumRule, make_bitmap
from tests.properties.reconciliation_cost import RULES, make_pair, take, write_many

TICK_S = 0.001
Row = dict[str, str | float]
MEMBERS = 64
VOTERS = 31
SWARM = RULES.swarm


async def measure_pause(work: Callable[[], Awaitable[None]]) -> tuple[float, float]:
    """The longest pause of the loop while `work` is done, and how long that took, in seconds."""
    longest, running = 0.0, True

    async def tick() -> None:
        nonlocal longest
        before = time.perf_counter()
        while running:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            longest, before = max(longest, now - before - TICK_S), now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(10 * TICK_S)
    longest, began_s = 0.0, time.perf_counter()
    await work()
    took_s = time.perf_counter() - began_s
    await asyncio.sleep(2 * TICK_S)
    running = False
    await ticking
    return longest, took_s


def make_proposal(parts: int) -> tuple[Proposal, PeerId, Head, Authority]:
    """The largest proposal of a round with so many parts, its proposer, and what it is judged by."""
    crowd = sorted((Identity(bytes([number + 1]) * 32) for number in range(MEMBERS)), key=lambda one: one.peer)
    by_peer = {one.peer: one for one in crowd}
    head = Head(round=7, digest=b"h" * 32, state_root=b"r" * 32, voters=tuple(one.peer for one in crowd[:VOTERS]))
    ready = Ready(
        round=8, base_root=head.state_root, contribution_root=b"c" * 32, tokens=1000, steps=10, norm=1.0, owns=True
    )
    signed = {one.peer: sign_ready(one, SWARM, ready) for one in crowd}
    planned = make_plan(head, 0, "int8", signed, parts, {one.peer: 1.0 for one in crowd})
    assert planned is not None, "everybody owns"
    plan = sign_message(crowd[0], SWARM, planned)
    everybody, roster = make_bitmap(frozenset(range(MEMBERS)), MEMBERS), digest_roster(plan.roster)
    done = {}
    for part, place in enumerate(plan.owners):
        word = PartDone(round=8, attempt=0, roster_digest=roster, part=part, digest=b"d" * 32, contributors=everybody)
        done[part] = sign_message(by_peer[plan.roster[place].signed.peer], SWARM, word)
    result = make_result(plan, done, head, "int8", frozenset(), VOTERS)
    owner = crowd[0].peer
    authority = Authority(swarm=SWARM, owner=owner, rule=QuorumRule.TWO_THIRDS, may_declare=False, parts=parts)
    return Proposal(attempt=0, result=result, evidence=make_evidence(plan, done)), crowd[0].peer, head, authority


async def measure_proposal(parts: int) -> list[Row]:
    proposal, proposer, head, authority = make_proposal(parts)
    frame = encode_message(SWARM, proposal)
    judged = asyncio.Event()

    def judge(message: ROUND_MESSAGES, sender: PeerId) -> None:
        assert isinstance(message, Proposal), "the one that was made"
        check_evidence(message, sender, head, "int8", authority)
        judged.set()

    async def decode() -> None:
        decode_message_untrusted(SWARM, frame)

    async def judge_at_once() -> None:
        judge(proposal, proposer)

    async def judge_in_turn() -> None:
        tasks: list[asyncio.Task[object]] = []
        verification = Verification(
            SWARM, deliver=judge, drop=lambda *_: None, spawn=lambda work: tasks.append(asyncio.create_task(work))
        )
        verification.take(proposal, proposer, head.voters)
        await judged.wait()

    what = f"proposal of {parts} parts"
    rows = [print_row(f"{what} ({len(frame) / 1e3:.0f} kB), decoded", *await measure_pause(decode))]
    for name, work in (("judged at once", judge_at_once), ("judged as the daemon does", judge_in_turn)):
        forget_signatures()
        judged.clear()
        rows.append(print_row(f"{what}, {name}", *await measure_pause(work)))
    return rows


async def measure_reconciliation(entries: int) -> list[Row]:
    rows = []
    pool = write_many(entries)
    for layout, count, missed_by in (("end", entries - 1, "opener"), ("spread", entries // 2, "both")):
        for name, in_thread in (("on the loop", False), ("as the daemon does", True)):
            entropy = random.Random(1)
            opener, other, _ = make_pair(pool, layout, count, missed_by, entropy)
            pauses = await converse(opener, other, entropy.randbytes(SALT_BYTES), in_thread=in_thread)
            what = f"{count} of {entries} entries ({layout}) missed by {missed_by}, {len(pauses)} answers {name}"
            rows.append(print_row(what, max(pause_s for pause_s, _ in pauses), sum(took_s for _, took_s in pauses)))
    return rows


async def converse(opener: Ledger, other: Ledger, salt: bytes, *, in_thread: bool) -> list[tuple[float, float]]:
    """One conversation: the pause and the time of each answer of the other side."""
    conversation, pauses = Conversation(opener, salt), list[tuple[float, float]]()
    while conversation.request is not None:
        question, replies = conversation.request, list[Answer]()

        async def step(question: bytes = question, replies: list[Answer] = replies) -> None:
            replies.append(await asyncio.to_thread(answer, other, question) if in_thread else answer(other, question))

        pauses.append(await measure_pause(step))
        take(opener, replies[0].batches)
        take(other, conversation.go_on(replies[0].reply or b"", len(replies[0].batches)))
    return pauses


def print_row(what: str, pause_s: float, took_s: float) -> Row:
    print(f"{what}: pause {1e3 * pause_s:.1f} ms, took {1e3 * took_s:.1f} ms", flush=True)
    return {"what": what, "pause_s": pause_s, "took_s": took_s}


async def measure(parts: int, entries: int) -> list[Row]:
    return [*await measure_proposal(parts), *await measure_reconciliation(entries)]


def main() -> None:
    parser = argparse.ArgumentParser(description="pauses of the event loop")
    parser.add_argument("--parts", type=int, default=1000)
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(measure(options.parts, options.entries))
    if options.json:
        options.json.write_text(json.dumps({**describe_machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
