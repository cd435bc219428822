"""Who is in a simulated swarm and by which rules: drawn from a seed, and as a manifest.

Each later choice has a stream of its own, so that a seed keeps the world that it had.
"""

import random
from dataclasses import dataclass, fields, replace
from typing import Any

from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, WORK
from shoal.protocol.codecs import CODECS, UPDATE_CODECS
from shoal.protocol.identity import Identity
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import Draft, Manifest, Rounds, Task, Training, make_manifest
from tests.sim.faults import Population

PEERS_MAX = 12
FRAGMENTED = 0.15  # the share of the swarms
ATTENDED = 0.2  # the share in which weights go by more than work
GOSSIPING = 0.2  # the share in which peers without a quorum train on
RULES: dict[str, Any] = {
    "grace_s": 2.0,
    "part_elements": 256,
    "plan_timeout_s": 2.0,
    "sender_timeout_s": 3.0,
    "owner_timeout_s": 5.0,
    "exchange_timeout_s": 15.0,
    "commit_timeout_s": 5.0,
    "presence_period_s": 2.5,
    "presence_timeout_s": 8.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Who is there and by which rules."""

    founders: int
    first: int  # peers that are there from the start, the founders among them
    everybody: int = PEERS_MAX
    elements: int = 700
    part_elements: int = int(RULES["part_elements"])
    peers_min: int = 2
    quorum: str = "majority"
    voters_max: int = 31
    liars: tuple[int, ...] = ()
    codec: str = "int8"
    update_codec: str | None = None
    fragments: int = 1
    on_the_wire: bool = False  # every message is encoded and decoded on its way, which takes its time
    reroot_after_s: float | None = None  # 0: by the owner only; None: quorums come back, and a second log is a failure
    grace_s: float = RULES["grace_s"]
    weights: str = WORK
    gossip_after_s: float = 0.0

    @property
    def may_part(self) -> bool:
        return self.reroot_after_s is not None

    def population(self) -> Population:
        return Population(
            first=self.first, everybody=self.everybody, liars=self.liars, reroot_after_s=self.reroot_after_s
        )


def draw_cluster(rng: random.Random) -> Cluster:
    """Where members may lie, one of at least four founders does, or is restored from a backup: never a third."""
    may_lie = rng.random() < 0.3
    founders = rng.choice((4, 4, 5, 6, 7)) if may_lie else rng.choice((1, 1, 2, 3, 4))
    peers_min = rng.choice((2, 2, 2, 3))
    return Cluster(
        founders=founders,
        first=max(founders, peers_min, rng.randint(2, 7)),
        everybody=rng.randint(8, PEERS_MAX),
        elements=rng.choice((200, 500, 700, 900)),
        peers_min=peers_min,
        voters_max=max(founders, rng.choice((31, 31, 5, 3))),
        quorum="two_thirds" if may_lie else "majority",
        liars=(rng.randrange(founders),) if may_lie and rng.random() < 0.8 else (),
        on_the_wire=rng.random() < 0.05,
    )


def let_part(cluster: Cluster, rng: random.Random) -> Cluster:
    """In some swarms whose members do not lie, a quorum may be gone for good."""
    if cluster.quorum != "majority" or rng.random() >= 0.2:
        return cluster
    founders = rng.choice((2, 3, 4, 5, 5, 6))
    return replace(
        cluster,
        founders=founders,
        first=max(cluster.first, founders),
        voters_max=max(cluster.voters_max, founders),
        reroot_after_s=rng.choice((0.0, 20.0, 30.0, 30.0, 40.0)),
    )


def let_codecs_differ(cluster: Cluster, rng: random.Random) -> Cluster:
    """In some swarms what is contributed is shorter, or longer, than what is certified."""
    if rng.random() >= 0.2:
        return cluster
    codec, update_codec = rng.choice(sorted(CODECS)), rng.choice(sorted(UPDATE_CODECS))
    cluster = replace(cluster, codec=codec, update_codec=update_codec)
    chunk = CODECS[codec].block_elements
    # Three parts also of a codec with larger chunks.
    return replace(cluster, part_elements=chunk, elements=2 * chunk + cluster.elements) if chunk > 256 else cluster


def let_fragments_alternate(cluster: Cluster, rng: random.Random) -> Cluster:
    """In some swarms a round exchanges a share of the parts."""
    parts = -(-cluster.elements // cluster.part_elements)
    return cluster if rng.random() >= FRAGMENTED else replace(cluster, fragments=rng.randint(1, parts))


def let_weights_differ(cluster: Cluster, rng: random.Random) -> Cluster:
    """In some swarms weights go by the rounds before, too."""
    return cluster if rng.random() >= ATTENDED else replace(cluster, weights=rng.choice((PARTICIPATION, FRESHNESS)))


def let_train_on(cluster: Cluster, rng: random.Random) -> Cluster:
    """In some swarms peers without a quorum take back what they offered, train on and offer more."""
    if rng.random() >= GOSSIPING or cluster.quorum != "majority" or cluster.fragments > 1:
        return cluster
    return replace(cluster, gossip_after_s=rng.choice((1.0, 5.0, 20.0)))


def make_world_manifest(cluster: Cluster, owner: Identity, founders: tuple[Identity, ...]) -> Manifest:
    layout = Layout(tensors=(TensorSpec(name="w", shape=(cluster.elements,), init="uniform", std=0.02),))
    known = {field.name for field in fields(Rounds)}
    drawn = {"peers_min": cluster.peers_min, "quorum": cluster.quorum, "voters_max": cluster.voters_max}
    drawn |= {"codec": cluster.codec, "update_codec": cluster.update_codec, "part_elements": cluster.part_elements}
    drawn |= {"fragments": cluster.fragments, "grace_s": cluster.grace_s, "weights": cluster.weights}
    if cluster.reroot_after_s is not None:
        drawn["reroot_after_s"] = cluster.reroot_after_s
    rules = {name: value for name, value in (RULES | drawn).items() if name in known}
    training = Training(gossip_after_s=cluster.gossip_after_s)
    draft = Draft(name="sim", task=Task(kind="sim"), seed=1, rounds=Rounds(**rules), training=training)
    return make_manifest(draft, layout, owner.peer, tuple(one.peer for one in founders))
