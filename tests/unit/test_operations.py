"""docs/operations.md against the code: each word that an operator meets has its line, and no line is about nothing."""

import dataclasses
import re
from pathlib import Path

import pytest

from shoal.node import conduct, reach
from shoal.node.doctor import DEADLINE_S
from shoal.node.doctor_findings import Check
from shoal.node.doctor_swarm import RATE_BYTES_MAX, RATE_TIMEOUT_S
from shoal.node.metrics import Deadline, Metrics
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.protocol.effects import Phase
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.manifest import Rounds

TEXT = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def read_table(heading: str) -> dict[str, list[str]]:
    """The first table after a heading: its rows' cells by what stands in the first one, in backquotes."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert section, heading
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    table = {row[0].strip().strip("`"): [cell.strip() for cell in row[1:]] for row in rows}
    assert len(table) == len(rows), "a word has two lines"
    return table


@pytest.mark.parametrize(
    ("heading", "words"),
    [
        ("Phases", {one.value for one in Phase}),
        ("Limits", {field.name for field in dataclasses.fields(Rounds) if field.name.endswith("_s")}),
        ("Why an attempt failed, or a peer went on without another one", {one.value for one in Failure}),
        ("Why something from outside was refused", {one.value for one in Refusal}),
        ("Metrics", {one.name for one in Metrics().table}),
    ],
)
def test_every_word_has_its_line(heading: str, words: set[str]) -> None:
    table = read_table(heading)
    assert set(table) == words
    assert all(row[0] for row in table.values())


def test_every_line_of_the_doctor_is_described() -> None:
    section = TEXT.partition("\n## `shoal doctor`\n")[2].partition("\n## ")[0]
    words = re.findall(
        r"`([^`]+)`", " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("| "))
    )
    assert sorted(words) == sorted(one.value for one in Check)
    assert f"within {DEADLINE_S:.0f} s" in section
    assert f"at most {RATE_BYTES_MAX >> 20} MiB and {RATE_TIMEOUT_S:.0f} s each" in section


def test_reachability_is_told_in_the_words_of_the_code() -> None:
    assert set(read_table("Whether others can dial this peer")) == {one.value for one in (*ReachState, *ReachReason)}
    section = TEXT.partition("\n## Whether others can dial this peer\n")[2].partition("\n## ")[0]
    assert all(f"`{one.value}`" in section for one in NatMapping)
    for period_s in (reach.REACHABLE_PERIOD_S, reach.PRIVATE_PERIOD_S, reach.UNKNOWN_PERIOD_S, reach.FAILED_PERIOD_S):
        assert f"{period_s:g} s" in section


def test_the_limits_that_the_status_names_are_described() -> None:
    assert {one.value for one in Deadline} <= set(read_table("Limits"))


def test_reasons_that_the_text_mentions_exist() -> None:
    words = {one.value for one in (*Failure, *Refusal, *Phase)} | {field.name for field in dataclasses.fields(Rounds)}
    limits = read_table("Limits")
    followed = {word for row in limits.values() for word in re.findall(r"`([a-z_]+)`", row[1])}
    assert followed and followed <= words


def test_a_refusal_is_described_as_it_is_judged() -> None:
    for word, (_, honest) in read_table("Why something from outside was refused").items():
        assert honest.startswith("yes" if Refusal(word) in conduct.HONEST else "no"), word


def test_metrics_are_described_with_their_kinds_and_labels() -> None:
    table = read_table("Metrics")
    for one in Metrics().table:
        kind, labels, told = table[one.name]
        assert kind == one.kind
        assert re.findall(r"`([a-z]+)`", labels) == list(one.labels)
        assert told == one.help.rstrip(".")


def test_alerts_ask_for_metrics_that_exist() -> None:
    relay = read_table("`shoal relay`")
    known = {one.name for one in Metrics().table} | {"shoal_build_info", *relay}
    assert set(re.findall(r"\bshoal_[a-z0-9_]+", TEXT)) <= known


def test_the_figures_of_the_conduct_rules_are_those_of_the_code() -> None:
    section = TEXT.partition("### When a peer is hung up on")[2].partition("\n## ")[0]
    for figure in (
        f"{conduct.LIES_MAX} at once",
        f"{conduct.LIES_MAX + 1} and more within a minute",
        f"{conduct.LATE_MAX} messages at once or {conduct.LATE_MAX / conduct.WINDOW_S:.0f} a second",
        f"{conduct.LATE_PER_PART_MAX} for each part",
        f"After {conduct.REFUSED_S:.0f} s",
    ):
        assert figure in " ".join(section.split()), figure
    assert conduct.WINDOW_S == 60.0


def test_lines_are_short_enough_to_read_outside_tables() -> None:
    assert [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith("|")] == []
