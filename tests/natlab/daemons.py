"""Real daemons on the lab's hosts: a swarm whose peers run behind routers, asked for their status where they are."""

import shutil
from pathlib import Path

from shoal.node.config import CONTROL_PORT, TENSOR_PORT, WEB_PORT
from shoal.node.status import PeerStatus, Status
from tests.e2e.swarm import Peer, Swarm, run, vary_draft
from tests.natlab.lab import Host

# What a volunteer has: the default ports, open to whoever gets through.
OPTIONS = ["--control-host", "0.0.0.0", "--control-port", str(CONTROL_PORT)]
OPTIONS += ["--tensor-host", "0.0.0.0", "--tensor-port", str(TENSOR_PORT), "--web-port", str(WEB_PORT)]
NOBODY = "12D3KooWEZXjE41uU4EL2gpkAQeDXYok6wghN7wwNVPF5bwkaNfS"  # a valid peer id, of no peer


class LabPeer(Peer):
    """One daemon on one host."""

    def __init__(self, swarm: "LabSwarm", name: str, host: Host) -> None:
        super().__init__(swarm, name)
        self.host = host
        self.options = list(OPTIONS)
        self.launcher = host.space.prefix

    def status(self) -> Status | None:
        return self.host.call(super().status)

    @property
    def id(self) -> str:
        return run("id", "--data-dir", str(self.folder)).stdout.strip()

    def begin_anew(self) -> None:
        """Nothing is left in its folder but its key."""
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "identity.key":
                entry.unlink()
        self.roots.clear()

    def sees(self, other: "LabPeer") -> PeerStatus | None:
        """The other one's row in this one's table, if it is alive there."""
        return next((row for row in self.rows() if row.name == other.name and row.alive), None)

    def rows(self) -> tuple[PeerStatus, ...]:
        status = self.status()
        return () if status is None else status.peers

    def start(self, *arguments: str) -> "LabPeer":
        super().start(*arguments)
        return self


class LabSwarm(Swarm):
    """Its founders are the first peers that are added, named peer1, peer2 and so on."""

    def __init__(self, folder: Path, founders: int, peers_min: int = 2) -> None:
        super().__init__(folder, founders, draft=vary_draft(peers_min=peers_min))

    def add_on(self, host: Host, name: str) -> LabPeer:
        peer = LabPeer(self, name, host)
        self.peers.append(peer)
        return peer

    def begin(self, peer: LabPeer, *arguments: str) -> str:
        """Start it with the manifest; the URI for the others."""
        peer.start("up", "--manifest", str(self.manifest), *arguments)
        self.wait(f"{peer.name} answers", lambda: peer.status() is not None)
        status = peer.status()
        assert status is not None
        return status.uri
