"""The metrics of how this peer is reached, on both planes, brought up to date before they are read."""

from shoal.node.links import TensorLinks
from shoal.node.metrics import Metrics
from shoal.node.status import ControlStatus
from shoal.node.surroundings import Surroundings
from shoal.node.tensor_paths import TensorPaths
from shoal.node.tensor_relay import TensorRelay
from shoal.protocol.errors import Failure, Refusal


def show_reachability(
    metrics: Metrics, paths: TensorPaths, links: TensorLinks, control: ControlStatus, surroundings: Surroundings
) -> None:
    """Set everything that is not counted where it happens."""
    reach = paths.reach
    metrics.reachability.set(reach.state)
    metrics.reachability_reason.set(reach.reason)
    metrics.nat_mapping.set(reach.mapping)
    metrics.control_reachability.set(control.state)
    metrics.relays.set(len(control.relays))
    metrics.relay_reservations.set(control.reservations)
    metrics.relay_circuits.set(control.circuits)
    metrics.relayed_bytes.count_to(control.relayed_bytes)
    mapped = {port.listener.value for port in surroundings.mappings.mapped}
    for plane, gauge in metrics.mapped_ports.items():
        gauge.set(plane.value in mapped)
    for key, count in surroundings.failures.items():
        metrics.port_mapping_failures[key].count_to(count)
    metrics.lan_peers.set(surroundings.lan_peers)
    counts = links.statistics().paths
    for path, links_of_path in metrics.links.items():
        links_of_path.set(counts.get(path, 0))
    _show_relay(metrics, paths.relay)


def _show_relay(metrics: Metrics, relay: TensorRelay) -> None:
    metrics.tensor_relay_links.set(relay.carried)
    metrics.tensor_relay_opened.count_to(relay.opened)
    metrics.tensor_relay_bytes.count_to(relay.relayed_bytes)
    metrics.tensor_relay_budget_bytes.set(relay.budget_bytes)
    for end, ends in metrics.tensor_relay_ends.items():
        ends.count_to(relay.ends[Failure(end)])
    for refusal, refusals in metrics.tensor_relay_refusals.items():
        refusals.count_to(relay.refusals[Refusal(refusal)])
