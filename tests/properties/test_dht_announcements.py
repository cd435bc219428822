"""The announcement schedule under any order of events: never silent, never hasty, one of a kind at a time."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.announcements import ANNOUNCE_RETRY_MIN_S, LOOKUP_MIN_S, Announce, AnnouncementSchedule, LookUp
from shoal.protocol.identity import PeerId

START_S = 3_600_000.0

steps = st.lists(
    st.tuples(st.floats(0, 2000), st.sampled_from(["poll", "stored", "not stored", "found", "found none", "peers"])),
    max_size=80,
)


@given(st.binary(min_size=32, max_size=32), steps, st.lists(st.integers(0, 12), min_size=80, max_size=80))
def test_it_keeps_its_invariants(me: bytes, history: list[tuple[float, str]], counts: list[int]) -> None:
    schedule = AnnouncementSchedule(bytes(32), PeerId(me), START_S)
    now_s = START_S
    outstanding: set[type] = set()
    last: dict[type, float] = {}
    peers = 0
    for (pause_s, step), count in zip(history, counts, strict=False):
        now_s += pause_s
        if step == "poll":
            for intent in schedule.poll(now_s):
                kind = type(intent)
                assert kind not in outstanding and peers
                shortest_s = ANNOUNCE_RETRY_MIN_S if kind is Announce else LOOKUP_MIN_S
                assert now_s - last.get(kind, -1e9) >= shortest_s
                outstanding.add(kind)
                last[kind] = now_s
        elif step in ("stored", "not stored") and Announce in outstanding:
            outstanding.remove(Announce)
            schedule.note_announced(step == "stored", now_s)
        elif step in ("found", "found none") and LookUp in outstanding:
            outstanding.remove(LookUp)
            schedule.note_looked_up(int(step == "found"), now_s)
        elif step == "peers":
            peers = count
            schedule.note_peers(peers, now_s)
        deadline = schedule.next_deadline()
        assert (deadline is None) == (not peers or outstanding == {Announce, LookUp})
        if deadline is not None and deadline <= now_s:
            assert step != "poll", "what was due has just been done"
