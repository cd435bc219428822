"""What a control plane is started with, as the configuration says it; and what of it goes into status and metrics."""

from shoal.node.config import ControlTable
from shoal.node.control import ControlConfig, ControlReach, RelayLimits
from shoal.node.status import ControlStatus
from shoal.protocol.identity import Identity, format_peer_id

_WILDCARDS = ("0.0.0.0", "::")


def make_control_config(
    table: ControlTable,
    identity: Identity,
    swarm: bytes,
    bootstraps: tuple[str, ...],
    *,
    relays_unconfirmed: bool = False,
) -> ControlConfig:
    """The configuration of the libp2p host. A wildcard stands for both families, whichever it is written in."""
    hosts = _WILDCARDS if table.host in _WILDCARDS else (table.host,)
    return ControlConfig(
        identity=identity,
        swarm=swarm,
        listen=tuple(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{table.port}" for host in hosts),
        announce=table.announce,
        bootstrap=bootstraps,
        connections_max=table.connections_max,
        relay=make_relay_limits(table) if table.relay else None,
        relays_unconfirmed=relays_unconfirmed,
        relays_wanted=table.relays_wanted,
        listen_field="control.port",
    )


def make_relay_limits(table: ControlTable) -> RelayLimits:
    """Half of the connections at most are for peers that hold a place: each of the others may need a circuit."""
    reservations = min(table.relay_reservations_max, table.connections_max // 2)
    return RelayLimits(
        reservations_max=reservations,
        reservations_per_host_max=max(1, reservations // 4),
        circuits_max=2 * reservations,
        circuit_bytes_max=table.relay_circuit_mib_max * 1024 * 1024,
    )


def describe_control(reach: ControlReach, addresses: tuple[str, ...]) -> ControlStatus:
    """The line of the control port in a Status."""
    return ControlStatus(
        state=reach.state,
        addresses=addresses,
        confirmed=reach.confirmed,
        relays=tuple(format_peer_id(relay) for relay in reach.relays),
        relaying=reach.serves,
        reservations=reach.served.reservations,
        circuits=reach.served.circuits,
        relayed_bytes=reach.served.relayed_bytes,
    )
