"""What a configuration makes of the control plane."""

from shoal.node.config import ControlTable
from shoal.node.control import ControlReach, RelayCounts
from shoal.node.control_setup import describe_control, make_control_config
from shoal.node.reachability import ReachState
from shoal.protocol.identity import Identity, format_peer_id

ME = Identity(b"m" * 32)


def test_a_wildcard_stands_for_both_families() -> None:
    for host in ("0.0.0.0", "::"):
        config = make_control_config(ControlTable(host=host, port=7), ME, bytes(32), ())
        assert config.listen == ("/ip4/0.0.0.0/tcp/7", "/ip6/::/tcp/7")
    assert make_control_config(ControlTable(host="::1", port=7), ME, bytes(32), ()).listen == ("/ip6/::1/tcp/7",)
    assert make_control_config(ControlTable(host="10.0.0.1"), ME, bytes(32), ()).listen == ("/ip4/10.0.0.1/tcp/9460",)


def test_relaying_is_switched_off_by_one_word_and_never_takes_all_connections() -> None:
    assert make_control_config(ControlTable(relay=False), ME, bytes(32), ()).relay is None
    few = make_control_config(ControlTable(connections_max=10, relay_reservations_max=64), ME, bytes(32), ()).relay
    assert few is not None and few.reservations_max == 5 and few.reservations_per_host_max == 1


def test_the_status_names_the_relays() -> None:
    reach = ControlReach(state=ReachState.PRIVATE, relays=(ME.peer,), served=RelayCounts(circuits=3))
    status = describe_control(reach, ("/ip4/1.2.3.4/tcp/1",))
    assert status.state == "private" and status.relays == (format_peer_id(ME.peer),) and status.circuits == 3
