"""The in-memory twin keeps the contract, and the port's own values say what they mean."""

from collections.abc import Callable

import pytest

from shoal.node.control import ControlConfig, ControlHandlers, ControlPlane, PeerUnreachable, RequestRefused
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import Identity, short_peer_id
from tests.sim.memory_control import MemoryControl, MemoryNetwork
from tests.unit.node.control_contract import ControlContract


class TestMemoryControl(ControlContract):
    @pytest.fixture
    def make_plane(self) -> Callable[[ControlConfig, ControlHandlers], ControlPlane]:
        network = MemoryNetwork()
        return lambda config, handlers: MemoryControl(network, config, handlers)


def test_errors_name_the_peer_and_the_reason() -> None:
    peer = Identity(bytes(32)).peer
    error = PeerUnreachable(peer, Failure.PEER_SLOW, "no answer within 5 s")
    assert str(error) == f"{short_peer_id(peer)}: peer_slow: no answer within 5 s"
    assert str(RequestRefused(peer, Refusal.LIMIT)) == f"{short_peer_id(peer)} refused a request: limit"
