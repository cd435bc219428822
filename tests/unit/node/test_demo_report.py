"""The demo's summary: what it counts, and that it calls every failure of the demo by its name."""

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.node import demo_report
from shoal.node.demo_report import DemoRecord, finish_report
from shoal.node.export import CertifiedModel
from shoal.node.status import ReasonCount, Status
from shoal.protocol.identity import format_peer_id
from tests.unit.node.node_samples import Chain, Swarm, fill_folder, make_chain, make_samples
from tests.unit.protocol.samples import PEERS

ROUNDS = 3
NAMES = ("peer1", "peer2", "peer3")


def make_statuses(status: Status, swarm: Swarm) -> dict[str, Status]:
    """What the demo saw last of each peer; the chain's contributors are the first of the sample peers."""
    aborted = ((2, 1), (1, 4), (0, 0))
    return {
        name: replace(
            status,
            peer=format_peer_id(PEERS[number]),
            swarm=swarm.id.hex(),
            aborted=tuple(
                ReasonCount(reason=reason, count=count)
                for reason, count in zip(("owner_lost", "proposer_lost"), aborted[number], strict=True)
                if count
            ),
        )
        for number, name in enumerate(NAMES)
    }


def make_record(folder: Path, status: Status, swarm: Swarm, chain: Chain) -> DemoRecord:
    roots = {number: chain.heads[number].state_root.hex() for number in range(1, ROUNDS + 1)}
    return DemoRecord(
        folder=folder,
        text=None,
        statuses=make_statuses(status, swarm),
        roots={"peer1": roots, "peer2": roots, "peer3": {1: roots[1]}},
        survivors=("peer1", "peer2"),
        exit_codes={"peer1": 0, "peer2": 0, "peer3": -9},
        killed=("peer3",),
        joined=("peer2",),
        losses={1: 5.0, 2: 4.0, 3: 3.0},
    )


@pytest.fixture
def record(tmp_path: Path, status: Status, monkeypatch: pytest.MonkeyPatch) -> DemoRecord:
    """A demo of three rounds that went well. The trained model is tried by nobody here: that takes torch."""
    swarm = make_samples()
    chain = make_chain(swarm, ROUNDS)
    fill_folder(swarm, tmp_path / "peer1", chain)
    (tmp_path / "peer1" / "manifest.shoal").write_bytes(swarm.signed)

    async def try_model(model: CertifiedModel, text: Path | None) -> object:
        await asyncio.sleep(0)
        return demo_report._Outcome(loss_first=5.5, loss_last=3.0, sample="def fish():\n    return 1")

    model = CertifiedModel.__new__(CertifiedModel)
    monkeypatch.setattr(demo_report, "_try_model", try_model)
    monkeypatch.setattr(demo_report, "read_certified_model", lambda folder: model)
    monkeypatch.setattr(demo_report, "write_model", lambda one, path: path.write_bytes(b"model"))
    monkeypatch.setattr(demo_report, "_draw_plot", lambda record, outcome, last: None)
    return make_record(tmp_path, status, swarm, chain)


def read_report(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_a_demo_that_went_well_is_summed_up(
    record: DemoRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish_report(record, 0.0, tmp_path / "copy.json") == 0
    report = read_report(tmp_path / "copy.json")
    assert report == read_report(tmp_path / "report.json")
    assert (report["rounds_certified"], report["rounds_without_parts"]) == (ROUNDS, 0)
    assert report["state_root_round"] == ROUNDS
    assert len(set(report["final_roots"].values())) == 1 and set(report["final_roots"]) == {"peer1", "peer2"}
    assert sum(report["contributions"].values()) == sum(report["participation"].values())
    assert "?" not in report["contributions"], "every contributor has a name"
    assert report["rounds_aborted"] == {"owner_lost": 2, "proposer_lost": 4}, "whoever saw most is quoted"
    assert (report["loss_first"], report["loss_last"], report["plot"]) == (5.5, 3.0, None)
    assert Path(report["export"]).read_bytes() == b"model"
    told = capsys.readouterr().out
    assert "PROBLEM" not in told
    assert "failed attempts: owner_lost 2, proposer_lost 4" in told
    assert "    def fish():" in told


def with_roots(record: DemoRecord, name: str, roots: dict[int, str]) -> DemoRecord:
    return replace(record, roots={**record.roots, name: roots})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (
            lambda one: with_roots(one, "peer2", {1: "00" * 32, 2: one.roots["peer1"][2]}),
            "state roots differ in rounds [1]",
        ),
        (lambda one: with_roots(one, "peer3", {2: "00" * 32}), "state roots differ in rounds [2]"),
        (lambda one: with_roots(one, "peer2", {99: "00" * 32}), "the survivors were never seen at one common round"),
        (lambda one: replace(one, exit_codes={**one.exit_codes, "peer2": 1}), "peer2 did not leave with exit code 0"),
        (
            lambda one: replace(one, exit_codes={**one.exit_codes, "peer1": None}),
            "peer1 did not leave with exit code 0",
        ),
        (lambda one: replace(one, joined=("peer9",)), "peer9 never contributed"),
    ],
    ids=["survivors differ", "the killed differs", "never together", "exit code", "still running", "late peer"],
)
def test_every_failure_of_the_demo_fails_it_and_is_named(
    record: DemoRecord, spoil: Callable[[DemoRecord], DemoRecord], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish_report(spoil(record), 0.0, None) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")] == [
        f"PROBLEM: {problem}"
    ]


def test_a_loss_that_does_not_fall_fails_the_demo(
    record: DemoRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def try_model(model: CertifiedModel, text: Path | None) -> object:
        return demo_report._Outcome(loss_first=5.5, loss_last=5.5, sample="")

    monkeypatch.setattr(demo_report, "_try_model", try_model)
    assert finish_report(record, 0.0, None) == 1
    assert "PROBLEM: the loss did not fall" in capsys.readouterr().out


def test_who_was_killed_need_not_leave_in_good_order(record: DemoRecord) -> None:
    assert record.exit_codes["peer3"] == -9
    assert finish_report(record, 0.0, None) == 0


def test_a_demo_without_a_round_is_told_and_does_not_crash(
    record: DemoRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = make_samples(grace_s=9.0)
    fill_folder(empty, tmp_path / "none", make_chain(empty, 1))
    bare = replace(record, survivors=("none",), roots={"none": {}}, joined=(), losses={})
    assert finish_report(bare, 0.0, None) == 1
    assert "never seen at one common round" in capsys.readouterr().out


def test_without_the_extra_for_plots_there_is_none_and_the_demo_goes_on(
    tmp_path: Path, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    swarm = make_samples()
    record = make_record(tmp_path, status, swarm, make_chain(swarm, ROUNDS))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = demo_report._Outcome(loss_first=5.5, loss_last=3.0, sample="")
    assert demo_report._draw_plot(record, outcome, ROUNDS) is None
