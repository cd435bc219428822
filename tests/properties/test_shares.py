"""Who reduces how much: proportional to the shares, the same for everybody who computes it."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.protocol.identity import PeerId
from shoal.protocol.shares import PROBATION_ROUNDS, Shares, assign_parts

peers = st.lists(st.integers(0, 255), min_size=1, max_size=20, unique=True).map(
    lambda seeds: tuple(PeerId(bytes([seed]) * 32) for seed in seeds)
)
values = st.sampled_from((0.0, 0.25, 1.0))
ROUNDING = 1e-9


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[PeerId, ...], dict[PeerId, float], int]:
    order = draw(peers)
    return order, {peer: draw(values) for peer in order if draw(st.booleans())}, draw(st.integers(0, 200))


nineteen = tuple(PeerId(bytes([seed]) * 32) for seed in range(19))
few = {nineteen[seed]: 0.0 for seed in (6, 7, 8)} | {nineteen[seed]: 0.25 for seed in (10, 12, 18)}


@given(table=tables())
@example((nineteen, few, 83))  # somebody lacks more than one part
@settings(max_examples=150, deadline=None)
def test_parts_are_in_proportion_to_shares(
    table: tuple[tuple[PeerId, ...], dict[PeerId, float], int],
) -> None:
    order, shares, parts = table
    owners = assign_parts(order, shares, parts)
    assert len(owners) == parts
    weights = {peer: shares.get(peer, 1.0) for peer in order}
    if not any(weights.values()):
        weights = dict.fromkeys(order, 1.0)
    total = sum(weights.values())
    lacking_max = sum(1 / rank for rank in range(2, 1 + sum(weight > 0 for weight in weights.values())))
    for peer, weight in weights.items():
        excess = owners.count(peer) - parts * weight / total
        assert -lacking_max - ROUNDING < excess < 1
        assert weight or peer not in owners
    assert owners == assign_parts(order, dict(reversed(shares.items())), parts), "whatever order they were learnt in"
    smallest = min(weight for weight in weights.values() if weight)
    if parts * smallest / total > lacking_max + ROUNDING:
        assert set(owners) == {peer for peer, weight in weights.items() if weight}, "nobody with a share is left out"


@given(table=tables())
@settings(max_examples=50, deadline=None)
def test_more_parts_change_nothing_about_the_first(
    table: tuple[tuple[PeerId, ...], dict[PeerId, float], int],
) -> None:
    order, shares, parts = table
    assert assign_parts(order, shares, parts + 5)[:parts] == assign_parts(order, shares, parts)


ids = tuple(PeerId(bytes([seed]) * 32) for seed in range(5))
subsets = st.frozensets(st.sampled_from(ids))


@given(rounds=st.lists(st.tuples(subsets, subsets), max_size=30))
@settings(max_examples=100, deadline=None)
def test_members_that_saw_the_same_misses_agree_and_everybody_gets_another_chance(
    rounds: list[tuple[frozenset[PeerId], frozenset[PeerId]]],
) -> None:
    one, other = Shares(), Shares()
    for number, (owners, slow) in enumerate(rounds):
        for shares in (one, other):
            shares.note_round(number, owners | slow, slow)
        assert [one.share(peer) for peer in ids] == [other.share(peer) for peer in ids]
        assert all(one.share(peer) in (0.0, 0.25, 1.0) for peer in ids)
    end = len(rounds) + PROBATION_ROUNDS
    one.note_round(end, frozenset(), frozenset())
    assert all(one.share(peer) > 0.0 for peer in ids)
    one.note_round(end + 1, frozenset(ids), frozenset())
    assert all(one.share(peer) == 1.0 for peer in ids)
