"""A rust-libp2p node (PyPI package lattica) that a test drives, by the same lines as js/node.mjs. Not part of our venv.

The first line says what to start: {listen, bootstrap, relays, protocol}. The library has no call for its addresses, so
the test chooses the port. Its calls block, so each has a thread.
"""

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from lattica import Lattica  # type: ignore[import-not-found]

_speaking = threading.Lock()


def say(**line: object) -> None:
    """Print one line."""
    with _speaking:
        print(json.dumps(line), flush=True)


def start(first: dict[str, Any]) -> Any:
    """The node that the first line describes."""
    builder = Lattica.builder().with_listen_addrs(first["listen"]).with_protocol(first["protocol"])
    builder = builder.with_mdns(False).with_upnp(False).with_autonat(False).with_dcutr(False)
    if first["bootstrap"]:
        builder = builder.with_bootstraps(first["bootstrap"])
    if first["relays"]:
        builder = builder.with_relay_servers(first["relays"])
    return builder.build()


def describe(node: Any, peer: str) -> dict[str, object] | None:
    """What the node knows of a peer that identified itself."""
    known = node.get_peer_info(peer)
    if known is None:
        return None
    names = [name for name in dir(known) if not name.startswith("_")]
    return {name: value for name in names if not callable(value := getattr(known, name))}


CALLS: dict[str, Callable[..., object]] = {
    "peers": lambda node: node.get_all_peers(),
    "visible": lambda node: node.get_visible_maddrs(),
    "known": describe,
    "addresses_of": lambda node, peer: node.get_peer_addresses(peer),
    "rtt": lambda node, peer: node.get_peer_rtt(peer),
    "provide": lambda node, key: node.start_providing(key),
    "find_providers": lambda node, key: node.get_providers(key),
}


def obey(node: Any, command: dict[str, Any]) -> None:
    """Carry out one command."""
    try:
        say(id=command["id"], result=CALLS[command["call"]](node, *command["args"]))
    except Exception as error:  # noqa: BLE001
        # The library raises this type and no other.
        say(id=command["id"], error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Start, then obey."""
    first = json.loads(sys.stdin.readline())
    node = start(first)
    say(event="started", peer=node.peer_id(), addresses=[f"{one}/p2p/{node.peer_id()}" for one in first["listen"]])
    for line in sys.stdin:
        threading.Thread(target=obey, args=(node, json.loads(line)), daemon=True).start()


if __name__ == "__main__":
    main()
