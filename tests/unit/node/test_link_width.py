"""How many links to a peer pay."""

import pytest

from shoal.node.link_traffic import PeerTraffic
from shoal.node.link_width import LINKS_WANTED_MAX, WIDEN_RETRY_S, WINDOW_BYTES, LinkWidth, count_links_wanted
from shoal.protocol.identity import PeerId

PEER, OTHER = PeerId(b"p" * 32), PeerId(b"o" * 32)


def measured(rate: float, round_trip_s: float) -> PeerTraffic:
    traffic = PeerTraffic()
    traffic.add_round_trip(0.0, round_trip_s)
    traffic.send_rate.add(int(rate), 1.0)
    return traffic


@pytest.mark.parametrize(
    ("mbit", "round_trip_s", "links", "wanted"),
    [
        (100, 0.02, 1, 1),
        (100, 0.1, 1, 1),
        (250, 0.1, 1, 2),  # what one window gives on a path for a Gbit/s
        (250, 0.1, 2, 3),
        (250, 0.1, 4, 6),
        (250, 0.1, 8, 8),
        (10_000, 0.0002, 1, 1),
        (10_000, 0.1, 1, LINKS_WANTED_MAX),
    ],
)
def test_the_bandwidth_delay_product_over_the_window(mbit: float, round_trip_s: float, links: int, wanted: int) -> None:
    assert count_links_wanted(measured(mbit * 1e6 / 8, round_trip_s), links) == wanted


def test_one_link_before_anything_is_measured() -> None:
    assert count_links_wanted(PeerTraffic(), 1) == 1
    traffic = PeerTraffic()
    traffic.add_round_trip(0.0, 1.0)
    assert count_links_wanted(traffic, 1) == 1


def test_queues_that_the_exchange_fills_do_not_count() -> None:
    traffic = measured(125e6, 0.02)
    traffic.add_round_trip(1.0, 0.5)
    assert traffic.round_trip_s == 0.5
    assert count_links_wanted(traffic, 1) == 2


def test_one_at_a_time_and_a_pause_after_a_failure() -> None:
    width, traffic = LinkWidth(), measured(10 * WINDOW_BYTES, 1.0)
    assert width.begin(PEER, traffic, 1, 0.0)
    assert not width.begin(PEER, traffic, 1, 0.0)
    assert width.begin(OTHER, traffic, 1, 0.0)
    width.end(PEER)
    assert width.begin(PEER, traffic, 2, 0.0)
    width.refuse(PEER, 1.0)
    width.end(PEER)
    assert not width.begin(PEER, traffic, 2, 1.0)
    assert width.begin(PEER, traffic, 2, 1.0 + WIDEN_RETRY_S)
    width.end(PEER)
    assert not width.begin(PEER, traffic, LINKS_WANTED_MAX, 1.0 + WIDEN_RETRY_S)
