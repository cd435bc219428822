"""Transfers from donors of every kind: whatever they do, what an honest one has is fetched, once, within the bounds."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.protocol.fetch_plan import ASKS_PER_PIECE_MAX, WINDOW_MAX, FetchPlan
from tests.unit.protocol.samples import PEERS
from tests.unit.protocol.transfer import BYTES_MAX, Donor, Transfer, make_pieces

COUNT_MAX = 60
rates = st.sampled_from((5e4, 1e6, 10e6, 120e6))


@st.composite
def donors(draw: st.DrawFn) -> Donor:
    kind = draw(st.sampled_from(("honest", "dies", "stalls", "lies", "lacks")))
    at = draw(st.floats(0.0, 5.0))
    lacks = draw(st.integers(0, 2**COUNT_MAX - 1))
    missing = frozenset(piece.digest for at, piece in enumerate(make_pieces(COUNT_MAX)) if lacks >> at & 1)
    return Donor(
        rate=draw(rates),
        latency_s=draw(st.sampled_from((0.0, 0.05, 0.3))),
        dies_s=at if kind == "dies" else float("inf"),
        stalls_s=at if kind == "stalls" else float("inf"),
        lies=kind == "lies",
        missing=missing if kind == "lacks" else frozenset(),
    )


@given(
    count=st.integers(1, COUNT_MAX),
    nbytes=st.sampled_from((1000, 270_000, 1 << 20)),
    others=st.lists(donors(), max_size=5),
    honest_rate=st.sampled_from((1e6, 10e6)),
    known=st.booleans(),
)
# Four that are slow, and not known to be: one piece went round among them, and the honest donor was not asked.
@example(count=3, nbytes=1 << 20, others=[Donor(rate=5e4, latency_s=0.0)] * 4, honest_rate=1e6, known=False)
@settings(max_examples=100, deadline=None)
def test_with_one_honest_donor_everything_comes_once(
    count: int, nbytes: int, others: list[Donor], honest_rate: float, known: bool
) -> None:
    everybody = dict(zip(PEERS, [Donor(rate=honest_rate), *others], strict=False))
    plan = FetchPlan()
    pieces = make_pieces(count, nbytes)
    plan.add(pieces)
    for peer, donor in everybody.items():
        plan.add_donor(peer, donor.rate if known else None)
    transfer = Transfer(plan, everybody)
    assert transfer.run()
    assert set(transfer.first) == {piece.digest for piece in pieces}
    assert not any(everybody[peer].lies for peer in transfer.first.values())
    assert transfer.open_max <= WINDOW_MAX
    assert transfer.open_bytes_max <= BYTES_MAX
    figures = plan.figures()
    assert sum(one.delivered_bytes for one in figures.values()) == sum(piece.nbytes for piece in pieces)
    assert not figures[PEERS[0]].is_out, "an honest donor is not given up"
    # A slow donor's line is never what everybody waits for: no more than twice alone, and what time-outs cost.
    alone_s = sum(piece.nbytes for piece in pieces) / honest_rate
    assert transfer.now < ASKS_PER_PIECE_MAX * alone_s + 30.0


@given(count=st.integers(1, COUNT_MAX), others=st.lists(donors(), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_every_transfer_ends(count: int, others: list[Donor]) -> None:
    plan = FetchPlan()
    plan.add(make_pieces(count))
    everybody = dict(zip(PEERS, others, strict=False))
    for peer in everybody:
        plan.add_donor(peer, None)
    transfer = Transfer(plan, everybody)
    came = transfer.run()
    assert came is plan.is_done
    assert came or plan.find_unobtainable() is not None
