"""What counters of the links make of time."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.node.link_traffic import LEAST_S, RECENT_S, LeastRoundTrip, RecentRate


def test_a_recent_rate_is_that_of_the_last_minute() -> None:
    rate = RecentRate()
    assert rate.bytes_per_s(5.0, 0) is None
    rate.add(0.0, 1_000)
    assert rate.bytes_per_s(0.0, 1_000) is None
    assert rate.bytes_per_s(4.0, 1_400) == 100.0, "up to this moment, since the first reading"
    for now in range(10, 60, 10):
        rate.add(now, 1_000 + 100 * now)
    assert rate.bytes_per_s(55.0, 6_500) == 100.0
    for now in range(60, 200, 10):
        rate.add(now, 7_000)
    assert rate.bytes_per_s(199.0, 7_000) == 0.0, "what is older than a minute does not count"


@given(st.lists(st.floats(0.1, 40), min_size=1, max_size=80))
def test_a_recent_rate_looks_back_one_reading_further_than_a_minute_and_no_more(pauses: list[float]) -> None:
    rate, now, readings = RecentRate(), 0.0, list[float]()
    for pause in pauses:
        now += pause
        rate.add(now, int(now))
        readings.append(now)
    since = max((one for one in readings if one <= now - RECENT_S), default=readings[0])
    later = now + 1.0
    assert rate.bytes_per_s(later, int(later)) == (int(later) - int(since)) / (later - since)


def test_the_least_round_trip_is_that_of_the_last_stretches() -> None:
    least = LeastRoundTrip()
    assert least.seconds is None
    for now, seconds in ((0.0, 0.3), (1.0, 0.02), (2.0, 0.5), (LEAST_S, 0.4)):
        least.add(now, seconds)
    assert least.seconds == 0.02, "queues since then do not count"
    least.add(2 * LEAST_S, 0.35)
    assert least.seconds == 0.35, "a path that became longer is believed after a while"
