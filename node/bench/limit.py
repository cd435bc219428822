"""The least time that a round can take on this machine: what must be computed and moved, at the machine's own rates.

For every peer: the values are encoded, and the update is decoded. For every part at its owner: every contribution is
decoded and added, and the result encoded. All that travels is sealed, moved and opened. What is not counted: readiness,
plan, votes and certificate, what is written to disks, the outer step and the state's hash.
"""

from dataclasses import dataclass

from shoal.node.bench.codecs import CodecRates
from shoal.node.bench.machine import MachineRates
from shoal.node.bench.rates import GB

FLOAT32_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """CPU seconds of all peers together, and the wall time when the cores share them evenly."""

    code_s: float
    seal_s: float
    move_s: float
    wall_s: float


def compute_limit(
    *, peers: int, fp32_bytes: int, cores: int, codec_in: CodecRates, codec_out: CodecRates, machine: MachineRates
) -> Limit:
    """For one round of `peers`, of which each has `fp32_bytes` of values. Contributions are encoded by `codec_in`, the
    update by `codec_out`."""
    values_gb = fp32_bytes / GB
    encode_s = (peers * values_gb) / codec_in.encode_with_feedback + values_gb / codec_out.encode
    decode_s = peers * values_gb * (1 / codec_in.decode + 1 / codec_out.decode)
    # Every peer sends all but its own share of its contribution, and its share of the update to all others.
    moved_gb = (peers - 1) * values_gb * (codec_in.bits + codec_out.bits) / FLOAT32_BITS
    seal_s = 2 * moved_gb / machine.aes_256_gcm
    move_s = 2 * moved_gb / machine.tcp  # a core at either end
    code_s = encode_s + decode_s
    return Limit(
        code_s=code_s, seal_s=seal_s, move_s=move_s, wall_s=(code_s + seal_s + move_s) / max(1, min(cores, peers))
    )
