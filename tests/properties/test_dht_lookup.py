"""Look-ups over disjoint paths: bounded against anybody, exact among honest nodes, right while one path is honest."""

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from shoal.dht.lookup import (
    CLOSER_MAX,
    PATHS,
    QUERIES_MAX,
    QUERIES_PER_PATH,
    REPLICAS,
    Contact,
    Lookup,
    Query,
    deal_seeds,
    share_out,
)
from shoal.protocol.identity import PeerId, encode_libp2p_peer_id

KEY = b"\x12\x20" + b"k" * 32
ME = PeerId(b"m" * 32)


def node(number: int, kind: str = "honest") -> Contact:
    return Contact(peer=PeerId(hashlib.sha256(f"{kind} {number}".encode()).digest()), addresses=(f"{kind} {number}",))


def distance(contact: Contact, key: bytes = KEY) -> int:
    own = hashlib.sha256(encode_libp2p_peer_id(contact.peer)).digest()
    return int.from_bytes(own, "big") ^ int.from_bytes(hashlib.sha256(key).digest(), "big")


class Network:
    """Honest nodes that each know some others and name the closest of them."""

    def __init__(self, count: int, known: int, seed: int) -> None:
        self.nodes = [node(number) for number in range(count)]
        chance = random.Random(seed)
        ranked = sorted(self.nodes, key=distance)
        self.tables: dict[PeerId, list[Contact]] = {}
        for place, one in enumerate(ranked):
            # As a table of Kademlia: its own neighbourhood whole, of the rest a sample.
            near = ranked[max(0, place - REPLICAS) : place + REPLICAS]
            self.tables[one.peer] = list(dict.fromkeys([*near, *chance.sample(self.nodes, min(known, count))]))

    def answer(self, asked: Contact) -> list[Contact]:
        return sorted(self.tables[asked.peer], key=distance)[:CLOSER_MAX]


def run(lookup: Lookup, network: Network, chance: random.Random, dead: frozenset[PeerId]) -> list[Query]:
    """Answer what is asked, in any order; nodes outside of the network name more of their kind."""
    waiting: list[Query] = []
    asked: list[Query] = []
    lies = 0
    while True:
        new = lookup.poll()
        asked.extend(new)
        waiting.extend(new)
        assert len(waiting) <= PATHS * QUERIES_PER_PATH
        if not waiting:
            assert lookup.is_over
            return asked
        query = waiting.pop(chance.randrange(len(waiting)))
        if query.contact.peer in dead:
            lookup.note_failure(query)
        elif query.contact.peer in network.tables:
            lookup.note_answer(query, network.answer(query.contact))
        else:
            # The closest of many made-up ids, as somebody would who sits around the key.
            made = sorted((node(lies + number, "liar") for number in range(64)), key=distance)[:CLOSER_MAX]
            lies += 64
            lookup.note_answer(query, made)


@given(
    count=st.integers(1, 120),
    known=st.integers(0, 20),
    seed=st.integers(0, 2**32),
    liars=st.integers(0, 30),
    dead_share=st.floats(0, 0.9),
)
def test_no_node_is_asked_twice_and_all_is_bounded(
    count: int, known: int, seed: int, liars: int, dead_share: float
) -> None:
    network, chance = Network(count, known, seed), random.Random(seed)
    dead = frozenset(one.peer for one in network.nodes if chance.random() < dead_share)
    table = chance.sample(network.nodes, min(count, 20)) + [node(-number, "liar") for number in range(liars)]
    lookup = Lookup(KEY, ME, deal_seeds(KEY, (), table))
    asked = run(lookup, network, chance, dead)
    assert len({query.contact.peer for query in asked}) == len(asked) <= QUERIES_MAX
    closest = lookup.closest()
    assert len(closest) <= REPLICAS
    assert list(closest) == sorted(closest, key=distance)
    assert not {one.peer for one in closest} & dead


@given(count=st.integers(1, 120), seed=st.integers(0, 2**32), known=st.integers(4, 20))
def test_among_honest_nodes_the_closest_are_found(count: int, seed: int, known: int) -> None:
    network, chance = Network(count, known, seed), random.Random(seed)
    lookup = Lookup(KEY, ME, deal_seeds(KEY, (), chance.sample(network.nodes, min(count, 8))))
    run(lookup, network, chance, frozenset())
    assert [one.peer for one in lookup.closest()] == [
        one.peer for one in sorted(network.nodes, key=distance)[:REPLICAS]
    ]


@given(count=st.integers(1, 120), seed=st.integers(0, 2**32), liars=st.integers(1, 60))
def test_liars_that_hold_the_whole_routing_table_do_not_hide_the_closest_node(
    count: int, seed: int, liars: int
) -> None:
    network, chance = Network(count, 8, seed), random.Random(seed)
    table = [node(-number, "liar") for number in range(liars)]
    lookup = Lookup(KEY, ME, deal_seeds(KEY, [chance.choice(network.nodes)], table))
    asked = run(lookup, network, chance, frozenset())
    honest_path = {query.contact.peer for query in asked if query.path == 0}
    assert min(network.nodes, key=distance).peer in honest_path
    assert not {one.addresses[0] for one in (query.contact for query in asked if query.path == 0)} & {
        f"liar {-number}" for number in range(liars)
    }


@given(
    found=st.lists(st.lists(st.integers(0, 50), max_size=60), max_size=4),
    count=st.integers(0, 40),
)
def test_what_is_found_is_shared_out_between_paths(found: list[list[int]], count: int) -> None:
    kept = share_out(found, count)
    assert len(set(kept)) == len(kept) <= count
    everything = {one for each in found for one in each}
    assert set(kept) <= everything
    assert len(kept) == min(count, len(everything))
    for each in found:
        # Others can only take the places of a path that it does not need.
        share = count // max(1, len(found))
        assert set(each[:share]) <= set(kept)


def test_seeds_are_dealt_by_turns_and_own_choice_stands_alone() -> None:
    table, chosen = [node(number) for number in range(9)], [node(100)]
    ranked = sorted(table, key=distance)
    assert deal_seeds(KEY, (), table) == (tuple(ranked[0::3]), tuple(ranked[1::3]), tuple(ranked[2::3]))
    assert deal_seeds(KEY, chosen, table) == (tuple(chosen), tuple(ranked[0::2]), tuple(ranked[1::2]))
