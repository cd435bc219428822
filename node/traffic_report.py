"""What goes over the line: the status of both planes' traffic, and the metrics of it, brought up to date before they
are read."""

from collections.abc import Mapping

from shoal.node.exchange import PartExchange
from shoal.node.links import TensorLinks
from shoal.node.metrics import Direction, Metrics, Plane
from shoal.node.status import LineStatus, TrafficStatus

BITS_PER_MBIT = 1e6


def describe_traffic(
    control_bytes: Mapping[Direction, int], links: TensorLinks, exchange: PartExchange
) -> TrafficStatus:
    """Everything since the start."""
    totals, peers = links.totals(), links.statistics().peers
    return TrafficStatus(
        control_sent_bytes=control_bytes[Direction.SENT],
        control_received_bytes=control_bytes[Direction.RECEIVED],
        tensor_sent_bytes=totals.wire_bytes_out,
        tensor_received_bytes=totals.wire_bytes_in,
        contribution_bytes=exchange.encoded_bytes,
        fp32_bytes=exchange.fp32_bytes,
        tensor_send_bytes_per_s=max((one.send_bytes_per_s for one in peers if one.send_bytes_per_s), default=None),
        tensor_receive_bytes_per_s=max(
            (one.receive_bytes_per_s for one in peers if one.receive_bytes_per_s), default=None
        ),
    )


def show_traffic(metrics: Metrics, traffic: TrafficStatus, links: TensorLinks, line: LineStatus) -> None:
    """Set everything that is not counted where it happens."""
    metrics.wire_bytes[Direction.SENT, Plane.TENSOR].count_to(traffic.tensor_sent_bytes)
    metrics.wire_bytes[Direction.RECEIVED, Plane.TENSOR].count_to(traffic.tensor_received_bytes)
    metrics.wire_bytes[Direction.SENT, Plane.CONTROL].count_to(traffic.control_sent_bytes)
    metrics.wire_bytes[Direction.RECEIVED, Plane.CONTROL].count_to(traffic.control_received_bytes)
    metrics.contribution_bytes.count_to(traffic.contribution_bytes)
    metrics.contribution_fp32_bytes.count_to(traffic.fp32_bytes)
    totals = links.totals()
    metrics.payload_bytes[Direction.SENT].count_to(totals.payload_bytes_out)
    metrics.payload_bytes[Direction.RECEIVED].count_to(totals.payload_bytes_in)
    metrics.caps_bits_per_s[Direction.SENT].set(BITS_PER_MBIT * (line.upload_cap_mbit or 0.0))
    metrics.caps_bits_per_s[Direction.RECEIVED].set(BITS_PER_MBIT * (line.download_cap_mbit or 0.0))
