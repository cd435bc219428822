"""The metrics of how this peer is reached, on both planes, brought up to date before they are read."""

from shoal.node.links import TensorLinks
from shoal.node.metrics import Metrics
from shoal.node.reach import Reach
from shoal.node.status import ControlStatus
from shoal.node.surroundings import Surroundings


def show_reachability(
    metrics: Metrics, reach: Reach, links: TensorLinks, control: ControlStatus, surroundings: Surroundings
) -> None:
    """Set everything that is not counted where it happens."""
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
    paths = links.statistics().paths
    for path, links_of_path in metrics.links.items():
        links_of_path.set(paths.get(path, 0))
