"""The round core, driven by hand: what an exchange of many parts costs."""

from collections.abc import Callable
from typing import Any

import pytest

from shoal.protocol.exchange import Inbox
from shoal.protocol.pace import PartPace
from tests.unit.protocol import samples
from tests.unit.protocol.round_table import Table, cut_off
from tests.unit.protocol.samples import RULES, make_digests

FEW, MANY = 24, 96
SLACK = 1.5


def count_looks(monkeypatch: pytest.MonkeyPatch, parts: int, play: Callable[[Table], None]) -> int:
    """How often cores look at a sender, at an owner, or whether a part is here."""
    looks = 0

    def counted(old: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: Any) -> Any:
            nonlocal looks
            looks += 1
            return old(*args)

        return look

    with monkeypatch.context() as patches:
        patches.setattr(samples, "PARTS", parts)
        patches.setattr(make_digests, "__defaults__", (parts,))
        patches.setattr(Inbox, "has_part", counted(Inbox.has_part))
        patches.setattr(PartPace, "allowance_s", counted(PartPace.allowance_s))
        table = Table(4, rules=RULES)
        play(table)
        assert len(table.result().parts) == parts
    return looks


def play_well(table: Table) -> None:
    table.make_ready()
    table.settle()


def play_without_one(table: Table) -> None:
    """One member delivers nothing, so that every part waits for its deadline."""
    table.make_ready()
    silent = table.order()[-1]
    table.blocked = cut_off(silent)
    table.advance(2 * (RULES.sender_timeout_s + RULES.owner_timeout_s))
    silent.up = False


@pytest.mark.parametrize("play", [play_well, play_without_one])
def test_a_part_costs_the_same_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, play: Callable[[Table], None]
) -> None:
    few, many = (count_looks(monkeypatch, parts, play) for parts in (FEW, MANY))
    assert 0 < many <= SLACK * few * MANY / FEW
