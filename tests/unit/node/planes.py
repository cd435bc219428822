"""The control planes that a test's peers can have."""

from collections.abc import Callable

from shoal.node.control import ControlConfig, ControlHandlers, ControlPlane
from shoal.node.libp2p_host import Libp2pHost
from tests.sim.memory_control import MemoryControl, MemoryNetwork

MakeControl = Callable[[MemoryNetwork, ControlConfig, ControlHandlers], ControlPlane]


def in_memory(network: MemoryNetwork, config: ControlConfig, handlers: ControlHandlers) -> ControlPlane:
    return MemoryControl(network, config, handlers)


def over_libp2p(network: MemoryNetwork, config: ControlConfig, handlers: ControlHandlers) -> ControlPlane:
    """The real one, on loopback."""
    return Libp2pHost(config, handlers)
