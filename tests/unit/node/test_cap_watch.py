"""The caps that hold follow the local time."""

import time

from shoal.node.cap_watch import CapWatch
from shoal.node.rate_caps import Caps, make_schedule


def at(hour: int, minute: int = 0) -> time.struct_time:
    return time.struct_time((2026, 11, 22, hour, minute, 0, 6, 326, 0))


def test_caps_are_set_when_they_change_and_told() -> None:
    hour, applied, told = [7], [], []
    schedule = make_schedule(0.0, 100.0, ["08:00-18:00 upload 5 download 20"])
    watch = CapWatch(schedule, applied.append, told.append, lambda: at(hour[0]))
    for hour[0] in (7, 7, 8, 17, 18):
        watch.look()
    outside, inside = Caps(download_mbit=100.0), Caps(upload_mbit=5.0, download_mbit=20.0)
    assert applied == [outside, inside, outside]
    assert told[:2] == [
        "tensors: upload without a cap, download at most 100 Mbit/s",
        "tensors: upload at most 5 Mbit/s, download at most 20 Mbit/s",
    ]


def test_without_caps_nothing_is_said() -> None:
    said: list[object] = []
    watch = CapWatch(make_schedule(0.0, 0.0, []), said.append, said.append, lambda: at(12))
    watch.look()
    assert said == []
    assert (watch.caps, watch.until) == (Caps(), "")


def test_until_when_caps_hold_is_known_before_and_after_they_change() -> None:
    now, applied = [at(17, 59)], list[Caps]()
    schedule = make_schedule(0.0, 0.0, ["08:00-18:00 upload 5 download 20"])
    watch = CapWatch(schedule, applied.append, lambda text: None, lambda: now[0])
    watch.look()
    assert (watch.caps, watch.until) == (Caps(upload_mbit=5.0, download_mbit=20.0), "18:00")
    now[0] = at(18)
    assert watch.until == "18:00", "nobody has looked"
    watch.look()
    assert (watch.caps, watch.until) == (Caps(), "08:00")
    assert applied == [Caps(upload_mbit=5.0, download_mbit=20.0), Caps()]
