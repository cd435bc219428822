"""The id of a simulated swarm."""

from dataclasses import fields

import msgpack
from blake3 import blake3

from shoal.protocol.manifest import Manifest, Outer, Rounds, Training
from shoal.protocol.wire import encode_record

LATER = {
    "outer": (Outer, ("momentum_clip", "momentum_every", "second_moment", "epsilon")),
    "rounds": (Rounds, ("update_codec", "residual_kept", "fragments", "weights")),
    "training": (
        Training,
        (
            "overlap_steps",
            "mixing",
            "inner_optimizer",
            "schedule",
            "schedule_rounds",
            "learning_rate_end",
            "evaluate_every",
            "divide_data",
            "gossip_after_s",
        ),
    ),
}


def name_swarm(manifest: Manifest) -> bytes:
    """The swarm id: the manifest's digest, as it was before there were the LATER fields, where these have their default
    values. Who proposes follows from it, and so a seed keeps the world for which it was chosen."""
    tree = msgpack.unpackb(encode_record(manifest))
    for table, (kind, later) in LATER.items():
        values = tree[[field.name for field in fields(Manifest)].index(table)]
        for index, field in reversed(list(enumerate(fields(kind)))):
            if field.name in later and values[index] == field.default:
                del values[index]
    return blake3(msgpack.packb(tree)).digest()
