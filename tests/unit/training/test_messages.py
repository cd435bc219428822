"""Frames between daemon and trainer."""

import subprocess
import sys
from dataclasses import replace

import pytest

from shoal.node.training.messages import (
    DETAIL_BYTES_MAX,
    FRAME_BYTES_MAX,
    TASK_FAILED,
    Begin,
    Evaluated,
    Failed,
    FrameReader,
    Freeze,
    Merge,
    Ready,
    Sampled,
    encode_frame,
    trim_detail,
)
from shoal.protocol.errors import ProtocolError, Refusal
from tests.unit.training.tiny import make_start

MESSAGES = (
    make_start(),
    make_start(text=None),
    replace(make_start(), allow_tasks=("a.b:C", "d:E")),
    Begin(round=3, adopt=True),
    Begin(round=3, adopt=False, shift=True),
    Merge(round=4, included=b"\x05\x00", part_elements=256, adopt_all=False, begin=True, gain=0.25),
    Freeze(),
    Ready(round=3, steps=4, tokens=1024, loss_mean=2.5, batches_done=9),
    Evaluated(round=4, loss_nats=1.9, tokens=8192),
    Sampled(text=b"\xff\x00"),
    Failed(reason=TASK_FAILED, detail="ValueError at a.py:3: x", fatal=False),
)


@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_frames_come_out_whole_however_the_stream_is_cut(piece_bytes: int) -> None:
    stream = b"".join(encode_frame(message) for message in MESSAGES)
    reader = FrameReader()
    pieces = [stream[first : first + piece_bytes] for first in range(0, len(stream), piece_bytes)]
    assert tuple(message for piece in pieces for message in reader.feed(piece)) == MESSAGES


def test_a_frame_that_is_too_long_is_refused_by_its_header() -> None:
    with pytest.raises(ProtocolError) as caught:
        list(FrameReader().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big")))
    assert caught.value.refusal is Refusal.OVERSIZED


def test_a_frame_of_rubbish_is_refused() -> None:
    with pytest.raises(ProtocolError):
        list(FrameReader().feed(b"\x00\x00\x00\x02hi"))


def test_a_begin_that_both_adopts_and_shifts_is_refused() -> None:
    raw = encode_frame(Begin(round=3, adopt=False, shift=True))
    assert raw.endswith(b"\xc2\xc3"), "adopt and shift"
    with pytest.raises(ProtocolError, match="either adopt or shift"):
        list(FrameReader().feed(raw[:-2] + b"\xc3\xc3"))


def test_a_detail_fits_its_field_and_stays_text() -> None:
    assert trim_detail("plain") == "plain"
    trimmed = trim_detail("é" * DETAIL_BYTES_MAX)
    assert len(trimmed.encode()) == DETAIL_BYTES_MAX
    assert set(trimmed) == {"é"}


def test_the_daemon_side_needs_no_torch() -> None:
    code = "import sys, shoal.node.trainer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
