"""The caps in force, until when, and what tensors take of the line: by clocks that stand until the test moves them."""

import dataclasses
import time
from pathlib import Path

import pytest

from shoal.node import web
from shoal.node.config import LimitsTable, NodeConfig, TensorTable
from shoal.node.line_use import LineUse
from shoal.node.link_traffic import PeerTraffic
from shoal.node.links import TensorLinks
from shoal.node.status import LineStatus
from tests.unit.node.exposition import read
from tests.unit.node.link_harness import ALICE, BOB, CONFIG, SWARM, RecordingSink
from tests.unit.node.node_samples import make_samples, open_peer

DAY = LimitsTable(upload_mbit=50.0, hours=("08:00-18:00 upload 5 download 20", "22:00-06:00 upload 0 download 0"))
MBIT = 125_000


class Bench:
    """A line whose clocks stand until the test moves them, and the counters of one peer on it."""

    def __init__(self, limits: LimitsTable, *, relay: bool = True, reached: bool = True) -> None:
        self.now_s = 1_000.0
        self.time_of_day = 17, 59
        self.told: list[str] = []
        self.links = TensorLinks(ALICE, SWARM, CONFIG, RecordingSink())
        config = NodeConfig(limits=limits, tensor=TensorTable(relay=relay))
        self.line = LineUse(
            config, self.links, lambda: reached, self.told.append, lambda: self.now_s, self._tell_local_time
        )

    @property
    def traffic(self) -> PeerTraffic:
        return self.links.traffic_with(BOB.peer)

    def _tell_local_time(self) -> time.struct_time:
        return time.struct_time((2026, 11, 22, *self.time_of_day, 59, 6, 326, 0))


def test_what_holds_and_until_when_changes_with_the_time_of_day() -> None:
    bench = Bench(DAY)
    seen = []
    for bench.time_of_day in ((7, 59), (8, 0), (17, 59), (18, 0), (21, 59), (22, 0), (0, 0), (5, 59), (6, 0)):
        bench.line.look()
        status = bench.line.status()
        seen.append((status.upload_cap_mbit, status.download_cap_mbit, status.caps_until))
    morning, day, evening, night = (
        (50.0, None, "08:00"),
        (5.0, 20.0, "18:00"),
        (50.0, None, "22:00"),
        (None, None, "06:00"),
    )
    assert seen == [morning, day, day, evening, evening, night, night, night, morning]
    assert len(bench.told) == 5, "each change once"


def test_what_is_told_is_what_the_links_keep_to() -> None:
    bench = Bench(DAY)
    bench.line.look()
    capped = bench.links.upload.streams_max
    bench.time_of_day = (22, 0)
    assert bench.line.status().upload_cap_mbit == 5.0, "nobody has looked: the links keep to it still"
    assert bench.links.upload.streams_max == capped is not None
    bench.line.look()
    assert bench.line.status().upload_cap_mbit is None
    assert bench.links.upload.streams_max is None


def test_without_caps_nothing_ends_and_nothing_is_withheld() -> None:
    bench = Bench(LimitsTable())
    bench.line.look()
    bench.now_s += 1
    assert bench.line.status() == LineStatus(sent_mbit=0.0, received_mbit=0.0)
    assert bench.told == []


def test_the_rates_are_those_of_the_last_minute() -> None:
    bench = Bench(LimitsTable())
    assert bench.line.status().sent_mbit is None
    bench.line.look()
    assert bench.line.status().sent_mbit is None, "no time has gone by"
    for _ in range(6):
        bench.now_s += 10
        bench.traffic.payload_bytes_out += 30 * MBIT
        bench.traffic.payload_bytes_in += 10 * MBIT
        bench.line.look()
    assert (bench.line.status().sent_mbit, bench.line.status().received_mbit) == (3.0, 1.0)
    for _ in range(6):
        bench.now_s += 10
        bench.line.look()
    assert (bench.line.status().sent_mbit, bench.line.status().received_mbit) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("limits", "relay", "reached", "withheld"),
    [
        (LimitsTable(upload_mbit=5.0), True, True, True),
        (LimitsTable(hours=("08:00-09:00 upload 5 download 0",)), True, True, True),
        (LimitsTable(), True, True, False),
        (LimitsTable(upload_mbit=5.0), False, True, False),
        (LimitsTable(upload_mbit=5.0), True, False, False),
    ],
)
def test_relaying_is_withheld_where_nothing_but_the_caps_is_in_the_way(
    limits: LimitsTable, relay: bool, reached: bool, withheld: bool
) -> None:
    assert Bench(limits, relay=relay, reached=reached).line.status().relay_withheld is withheld


async def test_status_and_metrics_of_a_peer_tell_the_same(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        reporter = peer.reporter
        assert reporter.build_status().line == LineStatus()
        for direction in ("sent", "received"):
            assert read(peer, "tensor_cap_bits_per_second", direction=direction) == 0
            assert read(peer, "tensor_payload_bytes_total", direction=direction) == 0
        bench = Bench(DAY)
        reporter.subjects = dataclasses.replace(reporter.subjects, line=bench.line)
        for bench.time_of_day, caps in (((17, 59), (5e6, 20e6)), ((18, 0), (50e6, 0.0)), ((22, 0), (0.0, 0.0))):
            bench.line.look()
            assert reporter.build_status().line == bench.line.status()
            shown = [read(peer, "tensor_cap_bits_per_second", direction=one) for one in ("sent", "received")]
            assert tuple(shown) == caps
        traffic = peer.links.traffic_with(BOB.peer)
        traffic.payload_bytes_out, traffic.payload_bytes_in, traffic.wire_bytes_out = 3_000, 2_000, 3_100
        assert read(peer, "tensor_payload_bytes_total", direction="sent") == 3_000
        assert read(peer, "tensor_payload_bytes_total", direction="received") == 2_000
        assert read(peer, "wire_bytes_total", direction="sent", plane="tensor") == 3_100


def test_the_page_shows_all_of_it() -> None:
    script = (Path(web.__file__).parent / "static/page.js").read_text()
    assert {field.name for field in dataclasses.fields(LineStatus) if f"line.{field.name}" not in script} == set()
