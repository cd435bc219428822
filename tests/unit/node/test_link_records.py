"""The receive buffer of a link, and the deadlines by which a link is judged."""

from dataclasses import replace

import pytest

from shoal.node.link_port import LinkConfig, LinkEnd
from shoal.node.link_records import LARGE_INBOX_BYTES, SMALL_INBOX_BYTES, LinkDeadlines, LinkSigns, RecordInbox
from shoal.node.link_traffic import RATE_PAYLOAD_BYTES_MIN, RateMeter
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.secure_channel import RECORD_BYTES_MAX, RECORD_OVERHEAD_BYTES


def record(kind: int, nbytes: int, fill: int = 7) -> bytes:
    return (kind << 24 | nbytes).to_bytes(4, "little") + bytes([fill]) * (nbytes + RECORD_OVERHEAD_BYTES - 4)


def feed(inbox: RecordInbox, data: bytes, chunk_bytes: int) -> list[tuple[int, bytes]]:
    """Deliver `data` in reads of at most `chunk_bytes`; the records that came out."""
    taken = []
    while data:
        free = inbox.free()
        n = min(len(free), chunk_bytes, len(data))
        assert n
        free[:n], data = data[:n], data[n:]
        inbox.add(n)
        while (found := inbox.next_record(lambda kind: kind * 1000)) is not None:
            taken.append((found[0], bytes(found[1])))
        inbox.compact()
    return taken


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1000, 4096, 10**6])
def test_records_come_out_whole_however_they_arrive(chunk_bytes: int) -> None:
    records = [record(kind, kind * 1000, fill) for fill, kind in enumerate([1, 2, 9, 1, 20, 0, 5, 1])]
    taken = feed(RecordInbox(records[0][:10]), b"".join(records)[10:], chunk_bytes)
    assert taken == [(raw[3], raw) for raw in records]


def test_full_records_are_read_without_moving_their_bytes() -> None:
    inbox = RecordInbox(b"")
    size = RECORD_BYTES_MAX + RECORD_OVERHEAD_BYTES
    raw = record(2, RECORD_BYTES_MAX)
    inbox.free()[:4] = raw[:4]
    inbox.add(4)
    assert inbox.next_record(lambda kind: RECORD_BYTES_MAX) is None
    inbox.compact()
    # Room for the rest of this record and the prefix of the next, and not one byte more.
    assert len(inbox.free()) == size - 4 + 4
    inbox.free()[:] = raw[4:] + raw[:4]
    inbox.add(size)
    assert inbox.next_record(lambda kind: RECORD_BYTES_MAX) is not None
    assert inbox.next_record(lambda kind: RECORD_BYTES_MAX) is None
    inbox.compact()
    assert inbox.has_partial
    assert len(inbox.free()) == LARGE_INBOX_BYTES - 4


def test_wrong_length_is_refused_by_its_prefix_alone() -> None:
    inbox = RecordInbox(record(1, 5)[:4])
    with pytest.raises(ProtocolError) as caught:
        inbox.next_record(lambda kind: 6)
    assert caught.value.refusal is Refusal.WRONG_LENGTH
    assert len(inbox.free()) < SMALL_INBOX_BYTES


def test_quiet_inbox_shrinks_and_a_filling_one_does_not() -> None:
    inbox = RecordInbox(b"")
    feed(inbox, record(200, 200_000), 10**6)
    assert len(inbox.free()) == SMALL_INBOX_BYTES
    inbox.shrink()
    assert not inbox.has_partial
    raw = record(200, 200_000)
    assert feed(inbox, raw[:100_000], 10**6) == []
    inbox.shrink()
    assert feed(inbox, raw[100_000:], 10**6) == [(200, raw)]


CONFIG = LinkConfig(
    tick_s=100, silence_timeout_s=10, stall_timeout_s=20, idle_timeout_s=100, rate_window_s=5, rate_bytes_per_s_min=100
)
QUIET = LinkSigns(
    wire_bytes_in=0,
    wire_bytes_taken=0,
    frames=0,
    reading_held=False,
    writing_paused=False,
    unfinished=False,
    busy=False,
)


def judge(signs_at: list[tuple[float, LinkSigns]]) -> list[LinkEnd | None]:
    deadlines = LinkDeadlines(CONFIG, 0.0)
    return [deadlines.judge(now_s, signs) for now_s, signs in signs_at]


def test_silence_counts_from_the_last_byte() -> None:
    heard = replace(QUIET, wire_bytes_in=1)
    assert judge([(0, QUIET), (8, heard), (17, heard), (18, heard)]) == [None, None, None, LinkEnd.SILENT]


def test_silence_does_not_count_while_we_do_not_listen() -> None:
    held = replace(QUIET, reading_held=True)
    assert judge([(0, held), (15, held), (30, held), (39, QUIET), (40, QUIET)])[:4] == [None] * 4
    assert judge([(0, held), (30, held), (40, QUIET)])[-1] is LinkEnd.SILENT


def run_doubted(answer_at_s: int) -> tuple[list[int], int]:
    """When a link pings and when it ends that is doubted at 9 s, with a byte here already that was not looked at."""
    deadlines = LinkDeadlines(replace(CONFIG, tick_s=1, doubt_timeout_s=4, ping_period_s=8), 0.0)
    pings: list[int] = []
    for now_s in range(40):
        if now_s == 9:
            deadlines.doubt()
            deadlines.doubt()
        wire_bytes = min(now_s, 9) + (now_s >= answer_at_s)
        if deadlines.judge(now_s, replace(QUIET, wire_bytes_in=wire_bytes)) is LinkEnd.SILENT:
            return pings, now_s
        pings += [now_s] if deadlines.is_ping_due(now_s) else []
    raise AssertionError("it never ends")


def test_a_link_that_is_in_doubt_has_little_time_to_show_that_it_lives() -> None:
    assert run_doubted(answer_at_s=99) == ([8, 9], 12)
    assert run_doubted(answer_at_s=13) == ([8, 9], 12)
    assert run_doubted(answer_at_s=11) == ([8, 9, 17], 21)


def test_late_tick_is_not_the_peers_silence() -> None:
    deadlines = LinkDeadlines(replace(CONFIG, tick_s=1), 0.0)
    times = [1, 2, 3, 60, 61, 62, 63, 64, 65, 66]
    assert [deadlines.judge(now_s, QUIET) for now_s in times] == [None] * 9 + [LinkEnd.SILENT]


def test_stall_counts_from_the_last_byte_that_the_kernel_took() -> None:
    paused = [replace(QUIET, writing_paused=True, wire_bytes_in=n, wire_bytes_taken=n > 2) for n in range(6)]
    times = [0.0, 8.0, 16.0, 24.0, 32.0, 44.0]
    assert judge(list(zip(times, paused, strict=True))) == [None, None, None, None, None, LinkEnd.STALLED]


def test_payload_must_keep_a_rate() -> None:
    def at(now_s: float, bytes_in: int, unfinished: bool = True) -> tuple[float, LinkSigns]:
        return now_s, replace(QUIET, wire_bytes_in=bytes_in, unfinished=unfinished)

    assert judge([at(0, 0), at(4, 1), at(5, 499)])[-1] is LinkEnd.SLOW
    assert judge([at(0, 0), at(5, 500), at(9, 501), at(10, 1000)]) == [None] * 4
    assert judge([at(0, 0), at(4, 1, unfinished=False), at(6, 2), at(10, 3)]) == [None] * 4


def test_idle_link_ends_and_a_busy_one_does_not() -> None:
    beats = [(float(now_s), replace(QUIET, wire_bytes_in=now_s)) for now_s in range(0, 101, 5)]
    assert judge(beats)[-1] is LinkEnd.IDLE
    assert judge([(now_s, replace(signs, busy=True)) for now_s, signs in beats])[-1] is None
    assert judge([(now_s, replace(signs, frames=int(now_s > 50))) for now_s, signs in beats])[-1] is None


def test_ping_is_due_once_a_period() -> None:
    deadlines = LinkDeadlines(replace(CONFIG, ping_period_s=3), 0.0)
    assert [deadlines.is_ping_due(now_s) for now_s in (1, 3, 4, 5, 6, 6.5)] == [False, True, False, False, True, False]


def test_rate_follows_recent_large_payloads() -> None:
    meter = RateMeter()
    assert meter.bytes_per_s is None
    meter.add(RATE_PAYLOAD_BYTES_MIN - 1, 1e-6)
    assert meter.bytes_per_s is None
    for _ in range(50):
        meter.add(1_000_000, 1.0)
    assert meter.bytes_per_s == pytest.approx(1e6)
    for _ in range(50):
        meter.add(1_000_000, 0.1)
    assert meter.bytes_per_s == pytest.approx(1e7, rel=1e-3)
