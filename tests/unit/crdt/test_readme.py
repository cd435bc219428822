"""The ledger's chapter of protocol/README.md says what the code says."""

from pathlib import Path

import pytest

from shoal.crdt import entries, eras, evidence, measurements
from shoal.crdt.certified import CREDIT_PEERS_MAX
from shoal.crdt.kinds import (
    KIND_RULES,
    AdmissionBody,
    BanBody,
    Kind,
    ReadmissionBody,
    RoundBody,
    TagBody,
    VersionedBody,
)
from tests.unit.protocol.test_readme import describe

TEXT = (Path(__file__).parents[3] / "protocol" / "README.md").read_text().partition("\n## Ledger\n")[2]
WORDS = " ".join(TEXT.split())
BODIES: dict[Kind, type | None] = {
    Kind.LEASE: None,
    Kind.ADDRESSES: None,
    Kind.CERTIFICATE: RoundBody,
    Kind.SNAPSHOT: RoundBody,
    Kind.TAG: TagBody,
    Kind.MANIFEST: VersionedBody,
    Kind.REROOT: VersionedBody,
    Kind.BAN: BanBody,
    Kind.READMISSION: ReadmissionBody,
    Kind.ADMISSION: AdmissionBody,
}


@pytest.mark.parametrize("record", [entries.Entry, entries.EntryContent], ids=lambda one: one.__name__)
def test_entries_stand_in_the_table_with_their_fields(record: type) -> None:
    assert f"| {record.__name__} | {describe(record)} |" in TEXT


def test_a_batch_is_described_with_its_fields() -> None:
    assert "{" + describe(entries._WireBatch) + "}" in WORDS
    assert f"at most {entries.BATCH_BYTES_MAX:,} bytes" in WORDS
    assert f"`version` is {entries.ENTRY_VERSION}." in WORDS
    assert f"(domain `{entries.SIGNATURE_DOMAIN}`)" in WORDS


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_stands_in_the_table(kind: Kind) -> None:
    rule, body = KIND_RULES[kind], BODIES[kind]
    fields = "opaque" if body is None else describe(body)
    author = "the owner" if rule.is_owners else "anybody"
    assert f"| `{kind.value}` | {fields} | {rule.body_bytes_max} | {author} |" in TEXT


def test_a_measurement_is_described_with_its_fields() -> None:
    assert f"| HeldOutLoss | {describe(measurements.HeldOutLoss)} |" in TEXT


def test_bounds_are_named() -> None:
    for bound in (
        f"A tag with the name `{measurements.HELD_OUT_TAG}`",
        f"at most {measurements.MEASUREMENT_BYTES_MAX} bytes",
        f"the {measurements.TAGS_READ_MAX} tags of this name",
        f"beyond its last {measurements.MEASUREMENTS_KEPT_MAX}",
        f"fewer than {entries.ENTRIES_PER_ERA_MAX:,} entries in an era",
        f"fewer than {entries.DECREES_MAX:,} in the permanent one",
        f"⌈{eras.ROUNDS_PER_ERA_MIN} / `rounds.snapshot_every`⌉",
        f"cut to {CREDIT_PEERS_MAX:,} peers",
        f"At most {evidence.AUTHORS_MAX} authors",
    ):
        assert bound in WORDS, bound
    assert (eras.PERMANENT_ERA, eras.FIRST_ERA, eras.ERAS_BEHIND, eras.ERAS_AHEAD) == (0, 1, 1, 1)


def test_lines_are_short_enough_to_read_outside_tables() -> None:
    assert [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith("|")] == []
