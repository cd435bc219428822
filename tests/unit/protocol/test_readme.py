"""protocol/README.md is enough to write another implementation; its tables say what the code says."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from shoal.protocol import admission, messages, pairing
from shoal.protocol.attendance import Attendance
from shoal.protocol.effects import VoteRecord
from shoal.protocol.errors import Refusal
from shoal.protocol.frames import PAYLOAD_BYTES_MAX, FrameKind
from shoal.protocol.messages import SCHEMA
from shoal.protocol.wire import DELTA_BYTES_MAX, MESSAGE_BYTES_MAX, Bound, Elided

TEXT = (Path(__file__).parents[3] / "protocol" / "README.md").read_text()
WORDS = " ".join(TEXT.split())
RECORDS = (
    messages.Ready,
    Attendance,
    messages.SignedReady,
    messages.RosterEntry,
    messages.Member,
    messages.PartResult,
    messages.Result,
    messages.LockCertificate,
    messages.Evidence,
    messages.Certificate,
    messages.Checkpoint,
    pairing.PairOffer,
    admission.Invitation,
    admission.AdmissionProof,
    admission.Ticket,
)
UNSIGNED = {(0.0, 2.0**bits - 1): f"u{bits}" for bits in (16, 32, 63)}


def describe(record: type) -> str:
    """The fields of a record as the tables write them."""
    hints = get_type_hints(record, include_extras=True)
    fields = [f"{field.name} {_describe(hints[field.name])}" for field in dataclasses.fields(record)]
    return ", ".join(fields) or "—"


def _describe(hint: Any) -> str:
    bound: Bound | None = None
    annotated: Any = Annotated
    if get_origin(hint) is annotated:
        hint, *extras = get_args(hint)
        bound = next((extra for extra in extras if isinstance(extra, Bound)), None)
        if any(isinstance(extra, Elided) for extra in extras):
            return f"{_describe(hint)}~"
    hint = getattr(hint, "__supertype__", hint)
    origin: Any = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [one for one in get_args(hint) if one is not type(None)]
        return f"{_describe(inner)}?"
    if origin is tuple:
        assert bound is not None, "every array has its bound"
        return f"[{bound.low}–{bound.high}] {_describe(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return hint.__name__  # type: ignore[union-attr]  # a class, not an instance
    if hint in (bool, float):
        return str(hint.__name__) + (f" {bound.low}–{_power(bound.high)}" if bound else "")
    assert bound is not None, "every number and string has its bound"
    if hint is int:
        return UNSIGNED.get((float(bound.low), float(bound.high))) or f"int {bound.low}–{_power(bound.high)}"
    name = {bytes: "bytes", str: "text"}[hint]
    return f"{name} {bound.low}" if bound.low == bound.high else f"{name} {bound.low}–{_power(bound.high)}"


def _power(number: float) -> str:
    whole = int(number)
    is_power = whole > 1024 and whole & (whole - 1) == 0
    return f"2^{whole.bit_length() - 1}" if is_power else str(whole)


@pytest.mark.parametrize("number", sorted(SCHEMA._classes))
def test_every_message_stands_in_the_table_with_its_fields(number: int) -> None:
    message = SCHEMA._classes[number]
    assert f"| {number} | {message.__name__} | {describe(message)} |" in TEXT


@pytest.mark.parametrize("record", RECORDS, ids=lambda one: one.__name__)
def test_every_record_stands_in_the_table_with_its_fields(record: type) -> None:
    assert f"| {record.__name__} | {describe(record)} |" in TEXT


def test_what_may_be_large_and_what_is_signed_are_named() -> None:
    assert f"{MESSAGE_BYTES_MAX:,} bytes" in WORDS and f"{DELTA_BYTES_MAX:,} bytes" in WORDS
    large = ", ".join(sorted(one.__name__ for one in messages._LARGE))
    assert f"May be larger: {large}." in WORDS
    domains = ", ".join(f"`{domain}` ({kind.__name__})" for kind, domain in messages._DOMAINS.items())
    assert f"{domains}, `ready` (Ready), `manifest` (the manifest's record)" in WORDS


@pytest.mark.parametrize("kind", FrameKind)
def test_every_frame_kind_stands_in_the_table(kind: FrameKind) -> None:
    payload = "yes" if PAYLOAD_BYTES_MAX[kind] else "no"
    assert f"| {kind.value} | {kind.name} | {payload} |" in TEXT


def test_the_codes_of_refusals_are_listed_in_order() -> None:
    assert ", ".join(f"{code} {refusal.value}" for code, refusal in enumerate(Refusal, 1)) in WORDS


def test_everything_that_a_voter_keeps_is_named() -> None:
    for field in dataclasses.fields(VoteRecord):
        assert f"`{field.name}`" in TEXT
