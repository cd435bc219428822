"""The judges of the chaos run are judged: each finds what it is there for. (`make chaos` runs the daemons.)"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import chaos, chaos_checks
from benchmarks.chaos_swarm import Sample
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.protocol.messages import Result, digest_record
from shoal.protocol.quorum import make_bitmap
from shoal.protocol.wire import encode_record
from tests.unit.protocol.samples import certify, make_head, make_sample_result


def store(folder: Path, *results: Result) -> Path:
    """A peer's folder with the certificates of these results."""
    folder.mkdir()
    with LedgerStore.open(folder / "ledger.sqlite") as opened:
        for result in results:
            body = encode_record(certify(result))
            opened.put_certificate(
                StoredCertificate(round=result.round, result_digest=digest_record(result), body=body)
            )
    return folder


def make_result(label: str) -> Result:
    return make_sample_result(make_head(), label=label)


def test_two_results_of_one_round_are_found(tmp_path: Path) -> None:
    folders = {name: store(tmp_path / name, make_result("one")) for name in ("first", "second")}
    log, compared, faults = chaos_checks.merge_logs(folders)
    assert (list(log), compared, faults) == ([1], 1, [])
    folders["third"] = store(tmp_path / "third", make_result("other"))
    _, compared, faults = chaos_checks.merge_logs(folders)
    assert compared == 2 and faults == ["round 1: third holds another result than the peers before it"]


def test_a_store_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 1000)
    _, _, faults = chaos_checks.merge_logs({"first": tmp_path})
    assert len(faults) == 1 and faults[0].startswith("first: ")


def test_tokens_count_by_the_parts_that_went_in(tmp_path: Path) -> None:
    result = make_result("one")
    whole = chaos_checks.read_log(store(tmp_path / "whole", result))[1]
    assert whole.tokens == sum(member.tokens for member in result.members)
    assert len(whole.members) == len(result.members)
    # The last member delivered half of its parts, the first none.
    bitmaps = [make_bitmap(frozenset({1, 2} if number < 2 else {1}), 3) for number in range(len(result.parts))]
    parts = tuple(replace(part, contributors=bits) for part, bits in zip(result.parts, bitmaps, strict=True))
    half = chaos_checks.read_log(store(tmp_path / "half", replace(result, parts=parts)))[1]
    assert half.tokens == round(result.members[1].tokens + result.members[2].tokens * 2 / len(parts))
    assert len(half.members) == 2


def test_roots_that_differ_are_found_by_peer_and_by_certificate() -> None:
    certified = chaos_checks.CertifiedRound(round=2, base_root="aa", digest="", tokens=0, members=(), share={})
    log = {1: replace(certified, round=1, base_root="00"), 2: certified}
    good = {0: {"first": "00"}, 1: {"first": "aa", "second": "aa"}, 2: {"first": "bb", "second": "bb"}}
    figures, faults = chaos_checks.check_roots(good, log)
    assert faults == [] and figures == {"rounds_certified": 2, "rounds_compared": 2, "roots_compared": 4}
    _, faults = chaos_checks.check_roots(good | {2: {"first": "bb", "second": "bc"}}, log)
    assert faults == ["round 2: first bb, second bc"]
    _, faults = chaos_checks.check_roots(good | {1: {"first": "ab", "second": "ab"}}, log)
    assert faults == ["round 1: shown with another root than round 2 was certified on"]
    # What was not seen was not compared, and that is a fault, too.
    _, faults = chaos_checks.check_roots({1: {"first": "aa"}}, log)
    assert faults == ["only 0 of 2 rounds were seen at two peers or more"]


def live(descriptors_more: float = 0.0, mib_more: float = 0.0, seconds: int = 200) -> list[Sample]:
    """A daemon that grows evenly by so much over its life."""
    return [
        Sample(at_s=at, descriptors=round(40 + descriptors_more * at / seconds), rss_mib=130 + mib_more * at / seconds)
        for at in range(0, seconds, 2)
    ]


@pytest.mark.parametrize(
    ("life", "wanted"),
    [
        (live(), ""),
        (live(descriptors_more=20, mib_more=30), ""),
        (live(descriptors_more=100), "descriptors became"),
        (live(mib_more=120), "MiB became"),
        (live(seconds=50), "no daemon lived 60 s"),
        ([], "no daemon lived 60 s"),
    ],
)
def test_growth_is_found(life: list[Sample], wanted: str) -> None:
    _, faults = chaos_checks.check_growth([("first", live()[:5]), ("second", life)])
    assert len(faults) == bool(wanted) and wanted in "".join(faults)


def test_standstill_and_tracebacks_are_found() -> None:
    assert chaos_checks.check_progress(59.0) == []
    assert "61 s" in chaos_checks.check_progress(61.0)[0]
    logs = {"first": "all well", "second": "Traceback (most recent call last):"}
    assert chaos_checks.check_logs(logs) == ["second: a traceback in its log"]


def test_the_run_names_its_seed_and_logs_when_something_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, chaos.NAMESPACE_MARK, "1")
    report = {"faults": ["something"], "log": [], "rounds": {"rounds_certified": 3}}
    monkeypatch.setattr(chaos, "run_chaos", lambda **options: dict(report))
    arguments = ["--seed", "77", "--seconds", "5", "--keep", str(tmp_path), "--json", str(tmp_path / "report.json")]
    assert chaos.main(arguments) == 1
    told = capsys.readouterr().out
    assert "FAILED: something" in told and "SEED=77" in told and str(tmp_path) in told
    assert '"seed": 77' in (tmp_path / "report.json").read_text()
    report["faults"] = []
    assert chaos.main(arguments) == 0
