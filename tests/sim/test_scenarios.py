"""The main failures as text: who does what, when. The transcripts stand in tests/sim/scenarios.

REWRITE=1 pytest tests/sim/test_scenarios.py writes them anew; without it a run must give the same text. What a scenario
is there for is asserted as well.
"""

import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from shoal.protocol.effects import (
    AttemptFailed,
    FetchBlob,
    PartReassigned,
    Planned,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certified, Plan, Promise, Proposal, Vote, digest_record
from tests.sim.stage import Stage

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "scenarios"
Play = Callable[[Stage], None]
SCENARIOS: dict[str, tuple[Callable[[], Stage], Play]] = {}


def scenario(*, peers: int, newcomers: int = 0, parts: int = 4) -> Callable[[Play], Play]:
    """Register a scenario with this cast."""

    def register(play: Play) -> Play:
        SCENARIOS[play.__name__] = (partial(Stage, peers, newcomers, parts), play)
        return play

    return register


def perform(name: str) -> str:
    """Play one scenario; its transcript."""
    make_stage, play = SCENARIOS[name]
    stage = make_stage()
    play(stage)
    words = (play.__doc__ or "").split()
    title = name.replace("_", " ")
    return "\n".join(
        [title.capitalize(), "", *textwrap.wrap(" ".join(words), 110), "", stage.describe_cast(), "", *stage.lines, ""]
    )


def sent_again(stage: Stage) -> Counter[int]:
    """How often each part of a contribution went to another owner after the first one."""
    first: dict[tuple[str, int], str] = {}
    again: Counter[int] = Counter()
    for deed in stage.deeds:
        effect = deed.effect
        if isinstance(effect, SendPart):
            sender, owner = stage.name(deed.peer), stage.name(effect.peer)
            if first.setdefault((sender, effect.part), owner) != owner:
                again[effect.part] += 1
    return again


# -- owners -----------------------------------------------------------------------------------------------------------


@scenario(peers=4, parts=6)
def owner_dies_before_the_exchange(stage: Stage) -> None:
    """An owner dies as the plan is made. Its parts go to others, and nothing else is sent again; the round goes on in
    the same attempt, without the dead peer's work."""
    stage.after(stage.does("ann", Planned), lambda peer: stage.kill(stage.peer("cid")))
    stage.run_to_round(1)
    parts = {part for part in range(6) if stage.owner_of(part, stage.said(Plan)[0]) == "cid"}
    assert parts and {move.part for move in stage.did(PartReassigned)} == parts
    assert set(sent_again(stage)) == parts
    assert stage.certificate(1).attempt == 0
    assert all(stage.contributors(1, part) == "ann bob dan" for part in range(6))


@scenario(peers=4, parts=6)
def owner_dies_during_the_exchange(stage: Stage) -> None:
    """An owner of two parts dies when everybody has the result of the first and nobody that of the second. Only the
    second is sent again, to another owner."""
    stage.after(stage.does("cid", SendResult, 3), stage.kill)
    stage.run_to_round(1)
    done = stage.did(SendResult, "cid")[0].part
    (move,) = stage.did(PartReassigned)
    assert move.part != done
    assert set(sent_again(stage)) == {move.part}
    assert stage.certificate(1).attempt == 0
    assert "cid" in stage.contributors(1, done), "what it had added up counts"


@scenario(peers=4)
def owner_dies_when_one_peer_has_its_result(stage: Stage) -> None:
    """An owner says that its part is done, and dies when the bytes have left for one peer only. Nothing is reassigned:
    the others get the bytes from the one who has them."""
    stage.after(stage.does("cid", SendResult), stage.kill)
    stage.run_to_round(1)
    assert not stage.did(PartReassigned) and not sent_again(stage)
    assert stage.did(FetchBlob)
    assert stage.certificate(1).attempt == 0


@scenario(peers=4)
def owner_dies_after_the_exchange(stage: Stage) -> None:
    """An owner dies when a result is proposed. Everybody has the bytes of its part, and the others are a quorum."""
    stage.after(stage.does("ann", Proposal), lambda peer: stage.kill(stage.peer("cid")))
    stage.run_to_round(1)
    assert not stage.did(PartReassigned) and not stage.did(AttemptFailed)
    assert all(stage.contributors(1, part) == "ann bob cid dan" for part in range(4))


@scenario(peers=4)
def owner_dies_unnoticed(stage: Stage) -> None:
    """An owner falls silent and no connection tells of it. The proposer's deadline for its part passes, and the part
    goes to another; the missed heartbeats come later."""
    stage.after(stage.does("ann", Planned), lambda peer: stage.kill_silently(stage.peer("cid")))
    stage.run_to_round(1)
    assert stage.certificate(1).attempt == 0
    assert {move.reason.value for move in stage.did(PartReassigned)} <= {"owner_slow", "owner_lost"}
    assert set(sent_again(stage)) == {move.part for move in stage.did(PartReassigned)}


@scenario(peers=4)
def slow_owner(stage: Stage) -> None:
    """A peer's uplink becomes narrow. What it owns keeps a round waiting; then it is given less, as proposer by itself,
    too. It is never taken for dead, no attempt fails, nobody else is blamed, and it is in every roster."""
    stage.run_to_round(1)
    stage.narrow("cid", 150e3)
    stage.run_to_round(6)
    owned = [[stage.owner_of(part, plan) for part in range(4)].count("cid") for plan in stage.first_plans()]
    assert owned[1] and owned[2] and not any(owned[3:6])
    assert {stage.name(move.old_owner) for move in stage.did(PartReassigned)} <= {"cid"}
    assert not stage.did(AttemptFailed)
    for plan in stage.first_plans():
        assert "cid" in stage.list_names(entry.signed.peer for entry in plan.roster)


# -- senders ----------------------------------------------------------------------------------------------------------


@scenario(peers=4)
def sender_dies_before_the_exchange(stage: Stage) -> None:
    """A peer that owns nothing dies before it has sent anything. The owners go on without it at once."""
    stage.before(stage.does("bob", SendPart), stage.kill)
    stage.run_to_round(1)
    assert {missing.part for missing in stage.did(SenderMissing)} == {0, 1, 2, 3}
    assert all(stage.contributors(1, part) == "ann cid dan" for part in range(4))
    assert stage.certificate(1).attempt == 0


@scenario(peers=4)
def sender_dies_during_the_exchange(stage: Stage) -> None:
    """A peer dies when half of its parts are sent. It is in the bitmaps of the parts that arrived and of no others.
    Back from its disk, it contributes to a later round."""
    stage.after(stage.does("bob", SendPart, 2), stage.kill)
    stage.run_to_round(1)
    arrived = {one.part for one in stage.did(SendPart, "bob")}
    for part in range(4):
        assert ("bob" in stage.contributors(1, part)) == (part in arrived)
    stage.restart("bob")
    stage.run_to_round(3)
    assert "bob" in stage.contributors(3, 0)


# -- proposers --------------------------------------------------------------------------------------------------------


@scenario(peers=4)
def proposer_dies_before_the_plan(stage: Stage) -> None:
    """The proposer dies instead of planning. The next in the order collects promises and plans."""
    stage.before(stage.does("ann", Planned), stage.kill)
    stage.run_to_round(1)
    assert stage.certificate(1).attempt == 1
    assert {stage.name(peer) for peer in stage.result(1).voters} == {"bob", "cid", "dan"}


@scenario(peers=4)
def proposer_dies_in_the_exchange(stage: Stage) -> None:
    """The proposer dies when its plan is followed. What owners have received is not sent to them again under the next
    proposer's plan."""
    stage.after(stage.does("dan", SendPart, 2), lambda peer: stage.kill(stage.peer("ann")))
    stage.run_to_round(1)
    assert stage.certificate(1).attempt == 1
    sends = Counter((deed.peer.number, deed.effect) for deed in stage.deeds if isinstance(deed.effect, SendPart))
    assert set(sends.values()) == {1}


@scenario(peers=4)
def proposer_dies_after_the_proposal(stage: Stage) -> None:
    """The proposer dies before any vote reaches it. A quorum may have voted, so the next proposer must propose the very
    same result again, which it learns from the promises."""
    stage.after(stage.does("ann", Proposal, 3), stage.kill)
    stage.run_to_round(1)
    assert stage.certificate(1).attempt == 1
    assert any(promise.accepted for promise in stage.said(Promise))
    assert len({digest_record(proposal.result) for proposal in stage.said(Proposal)}) == 1
    assert all(stage.contributors(1, part) == "ann bob cid dan" for part in range(4))


@scenario(peers=4)
def proposer_dies_when_one_peer_has_the_certificate(stage: Stage) -> None:
    """The proposer certifies a round, tells one peer and dies. The others find the same result, by that peer's word or
    by the promises."""
    stage.after(stage.does("ann", Certified), stage.kill)
    stage.run_to_round(1)
    assert len({digest_record(proposal.result) for proposal in stage.said(Proposal)}) == 1
    stage.restart("ann")
    stage.run_to_round(1)
    assert stage.result(1) == stage.certificate(1).result


# -- voters and everybody ---------------------------------------------------------------------------------------------


@scenario(peers=4)
def voter_dies_before_its_vote(stage: Stage) -> None:
    """A voter dies before its vote is written. The others are a quorum; it catches up when it is back."""
    stage.before(stage.writes_vote("cid"), stage.kill)
    stage.run_to_round(1)
    assert "cid" not in stage.list_names(vote.voter for vote in stage.certificate(1).votes)
    assert stage.certificate(1).attempt == 0
    stage.restart("cid")
    stage.run_to_round(1)
    assert stage.result(1)


@scenario(peers=4)
def voter_dies_after_its_vote(stage: Stage) -> None:
    """A voter dies when its vote is on its way. The vote counts; the peer catches up when it is back."""
    stage.after(stage.does("cid", Vote), stage.kill)
    stage.run_to_round(1)
    assert "cid" in stage.list_names(vote.voter for vote in stage.certificate(1).votes)
    stage.restart("cid")
    stage.run_to_round(1)
    assert stage.result(1)


@scenario(peers=4)
def everybody_dies_at_once(stage: Stage) -> None:
    """Power fails when everybody has voted and nobody holds the certificate. What the votes stand for is on the disks:
    after the restart that result is certified, none else."""
    stage.after(stage.does("bob", Vote), lambda peer: stage.kill_everybody())
    stage.run_until(lambda: bool(stage.said(Vote)) and not stage.up())
    votes = {vote.result_digest for vote in stage.said(Vote)}
    stage.run_for(3.0)
    stage.restart("ann", "bob", "cid", "dan")
    stage.run_to_round(1)
    assert {digest_record(stage.result(1))} == votes


# -- networks ---------------------------------------------------------------------------------------------------------


@scenario(peers=5)
def three_way_partition(stage: Stage) -> None:
    """Five voters in three groups: no group is a quorum, nobody certifies anything. When the network heals, a round is
    certified within seconds, and then one with all five in it."""
    stage.run_to_round(1)
    stage.split("ann bob", "cid dan", "eve")
    stage.run_for(30.0)
    assert {peer.core.head.round for peer in stage.up()} == {1}
    healed_s = stage.now
    stage.heal()
    stage.run_to_round(2)
    assert stage.now < healed_s + 15.0
    stage.run_until(lambda: len(stage.newest_result().members) == 5)


@scenario(peers=5)
def minority_heals(stage: Stage) -> None:
    """Two of five are cut off. The three go on; the two certify nothing, and catch up by certificates and bytes when
    the network heals. Their work of the missed rounds is in a later one."""
    stage.run_to_round(1)
    stage.split("ann bob cid", "dan eve")
    stage.run_to_round(3, "ann", "bob", "cid")
    assert {stage.peer(name).core.head.round for name in ("dan", "eve")} == {1}
    stage.heal()
    stage.run_until(lambda: stage.has_contributed("dan", 4) and stage.has_contributed("eve", 4))
    assert all(stage.result_of("dan", number) == stage.result_of("ann", number) for number in (2, 3))


@scenario(peers=4)
def one_way_link(stage: Stage) -> None:
    """What dan sends to ann is lost, and nothing else. Rounds go on; ann goes on without dan's parts, and everybody
    else counts them."""
    stage.cut("dan", "ann")
    stage.run_to_round(2)
    assert not any("dan" in stage.contributors(1, part) for part in range(4) if stage.owner_of(part) == "ann")


@scenario(peers=4)
def peer_that_missed_rounds_contributes_again(stage: Stage) -> None:
    """A peer is away for two rounds. It replays the certified updates, keeps what it has trained, and its next
    contribution, anchored at the current base, carries that work."""
    stage.run_to_round(1)
    stage.split("ann cid dan", "bob")
    stage.run_to_round(3, "ann", "cid", "dan")
    stage.heal()
    stage.run_until(lambda: stage.has_contributed("bob", 4))
    stage.run_to_round(stage.newest_result().round)
    assert stage.peer("bob").core.head == stage.peer("ann").core.head


# -- coming and going -------------------------------------------------------------------------------------------------


@scenario(peers=4)
def graceful_leave(stage: Stage) -> None:
    """A peer is asked to leave. A round without an update takes it out of the voters first; nobody waits for it and no
    attempt fails."""
    stage.run_to_round(1)
    stage.leave("dan")
    stage.run_until(lambda: not stage.peer("dan").up)
    stage.run_to_round(max(peer.core.head.round for peer in stage.up()) + 1)
    assert not stage.did(AttemptFailed)
    assert "dan" not in stage.list_names(stage.peer("ann").core.head.voters)


@scenario(peers=3, newcomers=9)
def flood_of_joins(stage: Stage) -> None:
    """Nine newcomers join a swarm of three at once, in the middle of a round. The round in work does not notice; the
    next ones take in so many newcomers a round."""
    names = ("dan", "eve", "fay", "gus", "hal", "ida", "jon", "kim", "leo")
    stage.after(stage.does("ann", Planned), lambda peer: stage.join(*names))
    stage.run_to_round(1, "ann", "bob", "cid")
    assert len(stage.result_of("ann", 1).members) == 3
    stage.run_until(lambda: all(stage.has_contributed(name, 2) for name in names))
    assert not stage.did(AttemptFailed)
    seen: set[PeerId] = set()
    for number in sorted(stage.peer("ann").disk.certificates):
        members = {member.peer for member in stage.result_of("ann", number).members}
        assert number == 1 or len(members - seen) <= stage.manifest.rounds.newcomers_max
        seen |= members


# -- the test ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_scenario(name: str) -> None:
    text = perform(name)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("REWRITE"):
        path.write_text(text)
    assert path.read_text() == text


def test_no_transcript_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SCENARIOS)


def test_transcripts_do_not_depend_on_the_order_of_hashes() -> None:
    code = "from tests.sim.test_scenarios import *; print(perform('minority_heals'), perform('graceful_leave'))"
    outputs = set()
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        outputs.add(done.stdout)
    assert len(outputs) == 1
