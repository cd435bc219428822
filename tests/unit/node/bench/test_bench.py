"""What `shoal bench` computes and shows, without measuring anything."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from shoal.node.bench.allreduce import AllreduceOptions, AllreduceResult, MeasuredRound
from shoal.node.bench.codecs import CodecRates, measure_codec
from shoal.node.bench.commands import add_bench_parsers, describe_memory, format_table, run_bench
from shoal.node.bench.limit import compute_limit
from shoal.node.bench.machine import MachineRates
from shoal.node.bench.peer import PIECE_ELEMENTS, compare, draw_values
from shoal.node.bench.rates import measure_rate
from shoal.protocol.codecs import CODECS
from shoal.protocol.errors import ConfigError

MACHINE = MachineRates(memory_copy=10.0, blake3=4.0, aes_256_gcm=8.0, chacha20_poly1305=3.0, tcp=2.0, tls=0.5)
CODEC = CodecRates(codec="int4", bits=4.0, encode=7.0, encode_with_feedback=5.0, decode=20.0, error=0.1)
FINE = CodecRates(codec="int8", bits=8.0, encode=10.0, encode_with_feedback=3.0, decode=40.0, error=0.007)


def test_a_rate_is_the_median_of_the_repeats_and_the_first_run_is_not_among_them() -> None:
    times_s = iter([0.0, 100.0, 200.0, 201.0, 300.0, 302.0, 400.0, 404.0])  # 100, 1, 2 and 4 s
    runs = []
    assert measure_rate(lambda: runs.append(1), 10**9, 3, lambda: next(times_s)) == 0.5
    assert len(runs) == 4


def test_the_least_time_of_a_round_counts_every_byte_once_at_each_end() -> None:
    limit = compute_limit(peers=4, fp32_bytes=10**9, cores=2, codec_in=CODEC, codec_out=FINE, machine=MACHINE)
    # 4 GB encoded with feedback, 1 GB of results encoded, 4 GB of contributions and 4 GB of results decoded.
    assert limit.code_s == pytest.approx(4 / 5 + 1 / 10 + 4 / 20 + 4 / 40)
    # Of each contribution, an eighth of a GB, three quarters leave; of the update, a quarter, each quarter goes
    # to three others.
    moved_gb = 4 * 3 / 4 / 8 + 4 * 3 / 16
    assert limit.seal_s == pytest.approx(2 * moved_gb / 8)
    assert limit.move_s == pytest.approx(2 * moved_gb / 2)
    assert limit.wall_s == pytest.approx((limit.code_s + limit.seal_s + limit.move_s) / 2)


def test_more_cores_than_peers_do_not_help() -> None:
    two, many = (
        compute_limit(peers=2, fp32_bytes=10**9, cores=cores, codec_in=CODEC, codec_out=FINE, machine=MACHINE)
        for cores in (2, 64)
    )
    assert many == two


def test_values_are_drawn_piece_by_piece_and_compared_with_their_mean() -> None:
    elements = PIECE_ELEMENTS + 1000
    drawn = [np.concatenate(list(draw_values(seed, elements))) for seed in (1, 2)]
    assert [one.size for one in drawn] == [elements] * 2 and not np.array_equal(*drawn)
    assert np.array_equal(drawn[0], np.random.default_rng(1).standard_normal(elements, np.float32))
    update = np.mean(np.stack(drawn), axis=0, dtype=np.float64).astype(np.float32)
    assert compare(update, (1, 2)) == pytest.approx((0.0, 0.0), abs=1e-6)
    update[-1] += 2.0
    assert compare(update, (1, 2)) == pytest.approx((2.0 / elements**0.5, 2.0), rel=1e-3)


def test_memory_is_told_by_its_kinds() -> None:
    told = describe_memory({"anonymous_mib": 1.4, "shared_mib": 0.0, "file_mib": 20.6})
    assert told == "in the last round: 1 its own, 0 shared, 21 mapped files"
    assert describe_memory({}) == ""


def test_columns_are_aligned_and_no_line_ends_in_spaces() -> None:
    lines = format_table(("name", "n", "note"), [("a", "10", ""), ("longer", "1", "x")], "<><")
    assert lines == ["name     n  note", "a       10", "longer   1  x"]


def test_every_figure_has_its_own_median() -> None:
    rounds = [
        MeasuredRound(step_s=step, prepare_s=1, exchange_s=other, commit_s=0, apply_s=0, cpu_s=2)
        for step, other in ((1.0, 9.0), (2.0, 7.0), (5.0, 8.0))
    ]
    result = AllreduceResult(
        options=AllreduceOptions(),
        rounds=tuple(rounds),
        peak_rss_mib=1,
        peaks_mib={},
        lag_p99_ms=1,
        rms_error=0,
        worst_error=0,
        state_root="",
    )
    assert (result.median.step_s, result.median.exchange_s) == (2.0, 8.0)
    assert json.loads(json.dumps(result.to_json()))["median"]["step_s"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "field", "fix"),
    [
        (["allreduce", "--peers", "1"], "--peers", "2 to 32"),
        (["allreduce", "--mib", "0"], "--mib", "0.0625 to 8192"),
        (["allreduce", "--mib", "nan"], "--mib", "0.0625 to 8192"),
        (["allreduce", "--codec", "zip"], "--codec", "int8"),
        (["allreduce", "--peers", "32", "--mib", "8192"], "--mib", "less"),
        (["allreduce", "--vectors", "tape"], "--vectors", "memory or disk"),
        (["allreduce", "--peers", "32", "--mib", "8192", "--vectors", "disk"], "--mib", "less"),
        (["allreduce", "--codec", "topk2"], "--update-codec", "int8"),
        (["allreduce", "--update-codec", "topk2"], "--update-codec", "int8"),
        (["allreduce", "--aggregator", "sum"], "--aggregator", "mean"),
        (["allreduce", "--rounds", "0"], "--rounds", "1 to 1000"),
        (["allreduce", "--part-elements", "1000"], "--part-elements", "multiple of 256"),
        (["allreduce", "--folder", "/nowhere/at/all"], "--folder", "make it"),
        (["codecs", "--repeats", "0"], "--repeats", "1 to 1000"),
        (["links", "--megabytes", "0"], "--megabytes", "1 to"),
        (["disk", "--json", "/nowhere/at/all.json"], "--json", "a folder that is there"),
        (["disk", "--json", "/"], "--json", "give a file"),
    ],
)
def test_bad_input_names_the_option_and_the_fix(arguments: list[str], field: str, fix: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _run(arguments)
    assert raised.value.field == field
    assert fix in raised.value.fix


def test_a_codec_is_described_by_what_it_costs_and_loses() -> None:
    found = measure_codec(CODECS["int8"], 1 << 12, 1)
    assert found.bits == 8.125
    assert 0.001 < found.error < 0.02
    assert min(found.encode, found.encode_with_feedback, found.decode) > 0


def test_the_disk_is_measured_in_a_folder_that_is_gone_afterwards(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("older")
    lines = _run(
        ["disk", "--repeats", "1", "--data-dir", str(tmp_path / "not" / "yet"), "--json", str(tmp_path / "out")]
    )
    assert lines[0] == f"the disk of {tmp_path}"
    assert [line.split("  ")[0] for line in lines[1:]][-1] == "a vote, durable"
    figures = json.loads((tmp_path / "out").read_text())
    assert figures["disk"]["write"] > 0, "and nothing is left of what the file held"
    assert figures["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _run(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser()
    add_bench_parsers(parser)
    lines: list[str] = []
    options = parser.parse_args(arguments)
    run_bench(options, getattr(options, "data_dir", None) or Path("/"), lines.append)
    return lines
