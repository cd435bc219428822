"""The simulator in the test run: fixed seeds are clean and repeatable, and what it says of itself is true."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shoal.protocol.errors import Refusal
from shoal.protocol.messages import Result
from shoal.protocol.quorum import Head
from shoal.protocol.rounds import RoundCore
from tests.sim.campaign import main
from tests.sim.checkers import Checker, InvariantBroken
from tests.sim.clusters import Cluster
from tests.sim.disk import Disk
from tests.sim.faults import DiskFate, Fault, FaultKind, Lie, Moment
from tests.sim.peer import SimPeer
from tests.sim.shrink import RUNS_MAX, shrink
from tests.sim.world import World

# In the first of the long ones a peer comes back in the calm and a round starts over; in the other one a voter has
# forgotten its votes and all quorums need it. In the last but one voters that would suffice are paused behind a
# partition; in the last one two peers contribute the same bytes.
SEEDS = (*range(702, 710), 2310198129, 297342268, 3585178878, 91000524)
SEEDS_THAT_PART = (15, 24, 71, 125, 154, 169, 186, 187, 220, 266, 303, 314)
# Peers without a quorum train on in these, and some of what they take back was in a plan before.
SEEDS_ALONE = (60127, 60662, 61309, 62294)


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_breaks_no_invariant(seed: int) -> None:
    outcome = World(seed).run()
    assert outcome.rounds >= 3


@pytest.mark.parametrize("seed", SEEDS_THAT_PART)
def test_seed_in_which_logs_may_part_ends_on_one_log(seed: int) -> None:
    world = World(seed)
    assert world.cluster.may_part
    assert world.run().rounds >= 3


@pytest.mark.parametrize("seed", SEEDS_ALONE)
def test_seed_in_which_peers_train_on_without_a_quorum_breaks_no_invariant(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_back = Counter[bool | None]()
    withdraw = RoundCore.withdraw

    def counted(core: RoundCore, now: float) -> bool | None:
        was_planned = withdraw(core, now)
        taken_back[was_planned] += 1
        return was_planned

    monkeypatch.setattr(RoundCore, "withdraw", counted)
    world = World(seed)
    assert world.cluster.gossip_after_s
    assert world.run().rounds >= 3
    assert taken_back[False] and taken_back[True], "never planned, and planned before"


def test_what_was_offered_on_a_log_that_was_left_is_settled_where_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logs parted by re-roots alone, which move nothing: what was made on one has its base on the other, too."""
    counted: list[tuple[int, ...]] = []
    settled = Checker.settled

    def note(checker: Checker, peer: SimPeer, result: Result, index: int, included: tuple[int, ...]) -> None:
        if result.members[index].contribution_root in [one.root for one in peer.parted]:
            counted.append(included)
        settled(checker, peer, result, index, included)

    monkeypatch.setattr(Checker, "settled", note)
    World(2730861223).run()
    assert any(counted)


def test_two_sides_declare_and_meet_and_the_heavier_one_stays() -> None:
    """`World.run` raises when somebody leaves the heavier log, or is refused, or loses a bit of its residual."""
    cluster = Cluster(founders=5, first=5, everybody=5, reroot_after_s=40.0)
    split = Fault(kind=FaultKind.PARTITION, at_s=10.0, duration_s=110.0, sides=(0, 0, 1, 1, 2))
    world = World(21, faults=[split], cluster=cluster)
    world.run()
    logs = world.checker.logs
    assert world.checker.reroots["declared"] == 3 and world.checker.reroots["went over"] >= 3
    assert len(logs.ends()) == 3
    heads = [peer.core.head for peer in world.peers]
    newest = max(heads, key=lambda head: head.round)
    assert logs.is_one(heads) and logs.heaviest(logs.ends()) == newest
    trained = [head for head in logs.back_from(newest) if world.checker.participants.get(head.digest) == 5]
    assert len(trained) >= 3, "the others contribute again"
    assert set(newest.voters) == set(world.by_id)


@pytest.mark.parametrize("reroot_after_s", [0.0, 20.0])
def test_a_quorum_that_is_gone_for_good_is_replaced(reroot_after_s: float) -> None:
    cluster = Cluster(founders=5, first=5, everybody=5, reroot_after_s=reroot_after_s)
    lost = Fault(kind=FaultKind.QUORUM_LOST, at_s=15.0, peers=(4, 3, 2, 1, 0))
    named = Fault(kind=FaultKind.REROOT, at_s=60.0, peers=(0, 1))
    world = World(22, faults=[lost] if reroot_after_s else [lost, named], cluster=cluster)
    world.run()
    assert world.checker.reroots == {"declared" if reroot_after_s else "signed by the owner": 1}
    assert [peer.number for peer in world.peers if peer.up] == [0, 1]


def test_an_update_that_is_gone_with_its_quorum_is_given_up() -> None:
    """Seed 3611528403 as it was found: of three voters the two that hold round 1 die, and the third knows of it."""
    seed = 3611528403
    world = World(seed, faults=[World(seed).faults[number] for number in (2, 3, 15)])
    outcome = world.run()
    assert outcome.attempts_failed["update_lost"] == 1 and world.checker.reroots["declared"] == 1
    assert outcome.rounds > 3


def test_a_round_whose_update_is_gone_is_jumped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 83044376 as it was found: whoever made round 12 is gone for good but one who lacks its update. Those who are
    left came by its snapshot."""
    steps = []
    installed = Checker.installed

    def note(checker: Checker, peer: SimPeer, head: Head) -> None:
        steps.append((peer.core.head.round, head.round))
        installed(checker, peer, head)

    monkeypatch.setattr(Checker, "installed", note)
    seed = 83044376
    world = World(seed, faults=[World(seed).faults[number] for number in (0, 2, 4, 5, 6, 7, 8)])
    assert world.run().rounds >= 20
    assert (11, 12) in steps


def test_without_a_reroot_a_second_log_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(founders=5, first=5, everybody=5, reroot_after_s=20.0)
    monkeypatch.setattr(Cluster, "may_part", property(lambda self: False))
    split = Fault(kind=FaultKind.PARTITION, at_s=10.0, duration_s=60.0, sides=(0, 0, 1, 1, 2))
    with pytest.raises(InvariantBroken, match="one result per round"):
        World(21, faults=[split], cluster=cluster).run()


def test_same_seed_same_trace_whatever_the_hash_seed() -> None:
    code = "from tests.sim.world import World; print(World(703).run().trace)"
    traces = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    ]
    assert traces[0] == traces[1] != ""


def test_a_run_is_a_function_of_its_seed_and_its_faults() -> None:
    world = World(704)
    again = World(704, faults=world.faults)
    fewer = World(704, faults=world.faults[:-1])
    traces = [one.run().trace for one in (world, again, fewer)]
    assert traces[0] == traces[1] != traces[2]


def test_every_kind_of_fault_and_lie_is_drawn_and_strikes() -> None:
    drawn = [fault for seed in range(300) for fault in World(seed).faults]
    assert {fault.kind for fault in drawn} == set(FaultKind)
    assert {fault.detail for fault in drawn if fault.kind is FaultKind.LIE} == set(Lie)
    assert {fault.detail for fault in drawn if fault.kind is FaultKind.CRASH} == set(DiskFate)
    assert {fault.after for fault in drawn if fault.after} == set(Moment)


def test_liars_are_fewer_than_a_third_and_only_where_two_thirds_decide() -> None:
    for seed in range(200):
        cluster = World(seed).cluster
        assert len(cluster.liars) <= (cluster.founders - 1) // 3
        assert not cluster.liars or cluster.quorum == "two_thirds"


@pytest.mark.parametrize("lie", list(Lie))
def test_a_liar_is_refused_or_outvoted_and_nobody_else_is_accused(lie: Lie) -> None:
    """`World.run` raises when an honest peer is refused, or certifies what a liar made up."""
    cluster = Cluster(founders=4, first=5, everybody=6, quorum="two_thirds", liars=(1,))
    lies = Fault(kind=FaultKind.LIE, at_s=5.0, duration_s=100.0, peers=(1,), detail=lie.value)
    world = World(11, faults=[lies], cluster=cluster)
    assert world.run().rounds > 10
    assert world.struck[FaultKind.LIE] == 1


@pytest.mark.parametrize(
    ("lie", "refusal"),
    [
        (Lie.WRONG_PART, Refusal.WRONG_DIGEST),
        (Lie.NAN_SCALE, Refusal.NOT_FINITE),
        (Lie.GARBAGE_RESULT, Refusal.NOT_FINITE),
        (Lie.PLANNED_WEIGHT, Refusal.OUT_OF_RANGE),
        (Lie.WRONG_LENGTH, Refusal.WRONG_LENGTH),
    ],
)
def test_a_lie_that_shows_is_refused_with_its_reason(lie: Lie, refusal: Refusal) -> None:
    cluster = Cluster(founders=4, first=4, everybody=4, quorum="two_thirds", liars=(1,))
    lies = Fault(kind=FaultKind.LIE, at_s=5.0, duration_s=100.0, peers=(1,), detail=lie.value)
    world = World(12, faults=[lies], cluster=cluster)
    world.run()
    assert world.checker.refusals[refusal.value] > 0


def test_shrinking_finds_the_faults_that_matter() -> None:
    runs = []

    def fails(chosen: tuple[int, ...]) -> bool:
        runs.append(chosen)
        return {3, 17} <= set(chosen)

    assert shrink(tuple(range(20)), fails, RUNS_MAX) == (3, 17)
    assert len(runs) <= RUNS_MAX + 1


def test_shrinking_stops_in_time_with_what_it_has() -> None:
    chosen = shrink(tuple(range(64)), lambda some: {0, 31, 63} <= set(some), 5)
    assert {0, 31, 63} <= set(chosen) and len(chosen) <= 64


def test_a_failure_is_replayed_and_shrunk_by_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(self: Disk) -> None:
        self.under_way = []

    monkeypatch.setattr(Disk, "finish", forget)
    monkeypatch.setattr(sys, "argv", ["sim", "--first-seed", "700", "--rounds", "1"])
    assert main() == 1
    said = capsys.readouterr().out
    assert "FAILED seed 700, commit " in said and "make sim SEED=700 FAULTS=none" in said
    monkeypatch.setattr(sys, "argv", ["sim", "--seed", "700", "--faults", "none"])
    with pytest.raises(InvariantBroken):
        main()


def test_many_seeds_are_summed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "summary.json"
    words = ["--first-seed", "705", "--rounds", "1000000", "--seconds", "0", "--jobs", "2", "--json", str(summary)]
    monkeypatch.setattr(sys, "argv", ["sim", *words])
    assert main() == 0
    said = json.loads(summary.read_text())
    assert said["seeds"] > 0 and said["rounds"] > said["seeds"] and said["broken"] == []
    assert said["rounds_per_minute_and_core"] > 0 and said["participants_per_round"] > 1
    assert said["faults"]["delay"] == said["seeds"] and said["rates_on_share"]["delay_mean_s"] == 1.0
    assert f"{said['rounds']} rounds" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_with_the_seeds_that_it_owes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place, summary = tmp_path / "place", tmp_path / "summary.json"

    def run(rounds: int, jobs: int, *more: str) -> dict[str, object]:
        kept = ["--resume", str(place), "--json", str(summary), "--jobs", str(jobs), "--rounds", str(rounds)]
        monkeypatch.setattr(sys, "argv", ["sim", *kept, *more])
        assert main() == 0
        counted: dict[str, object] = json.loads(summary.read_text())
        return counted

    first = run(1, 2, "--first-seed", "705")
    owed = json.loads(place.read_text())
    assert owed["given"] and owed["next_seed"] > max(owed["given"]), "pieces were under way when it stopped"
    then = run(int(str(first["rounds"])) + 1, 1)
    settled = json.loads(place.read_text())
    assert then["sittings"] == 2 and then["seeds"] == int(str(first["seeds"])) + 4
    assert settled["next_seed"] == owed["next_seed"]
    assert [*settled["left"], *settled["given"]] == owed["given"][:-1], "the last of them was run, none was forgotten"
    settled["commit"] = "another"
    place.write_text(json.dumps(settled))
    with pytest.raises(SystemExit, match=r"of commit another, seeds from 705 on.* Fix: go on at that"):
        run(1, 1)
    assert f"({first['rounds']} rounds are done)" in capsys.readouterr().out
