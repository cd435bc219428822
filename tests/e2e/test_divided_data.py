"""Members who all have the same text and draw from shares of it: what each of them drew, by its own trainer's word."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shoal.node.archive import open_archive
from shoal.protocol.identity import PeerId, parse_peer_id
from shoal.protocol.quorum import list_contributors
from tests.e2e.swarm import Peer, Swarm, replace_task, run
from tests.unit.training.user_tasks import importable, write_module

# The byte-level GPT, but that it notes the shares that it is given and the windows that it draws.
TASK = "watched_task:Watched"
SOURCE = """
from shoal.node.training.tasks import ByteGpt


class Watched(ByteGpt):
    def open_data(self, text, work):
        return Noted(super().open_data(text, work), text.parent / bytes(work.peer).hex())


class Noted:
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def take_share(self, place, places):
        self.note("share", place, places)
        self.batches.take_share(place, places)

    def batch(self, index):
        windows = self.batches.batch(index)
        self.note("drawn", *(bytes(one.astype("uint8")).hex() for one in windows))
        return windows

    def note(self, *words):
        with self.path.open("a") as file:
            print(*words, file=file)
"""
DRAFT = (
    replace_task(f'kind = "custom"\npath = "{TASK}"\nlayers = 1\nheads = 2\nwidth = 32\ncontext = 32')
    .replace("[training]\n", "[training]\ndivide_data = true\n")
    .replace("batch_size = 2\n", "batch_size = 8\n")
)
WINDOWS_WANTED = 1000  # of each: so many of some 65,000, twice drawn from all of them, have 15 in common
SHARES_WANTED = 2


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    modules = tmp_path / "modules"
    write_module(modules, "watched_task", SOURCE)
    with importable(modules):
        made = Swarm(tmp_path, founders=2, draft=DRAFT, create_options=("--allow-task", TASK))
        assert made.text is not None
        made.text.write_text("".join(f"{line:08d}\n" for line in range(8000)))  # no window of 33 bytes comes twice
        yield made
        made.end()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    place: int
    places: int
    windows: set[str] = field(default_factory=set)


def read_shares(path: Path) -> list[Share]:
    """What a peer's trainer has drawn of, the first share being everything."""
    shares = [Share(place=0, places=1)]
    for line in path.read_text().splitlines() if path.exists() else ():
        kind, *words = line.split()
        if kind == "share":
            shares.append(Share(place=int(words[0]), places=int(words[1])))
        else:
            shares[-1].windows.update(words)
    return shares


def find_id(peer: Peer) -> PeerId:
    return parse_peer_id(run("id", "--data-dir", str(peer.folder)).stdout.strip())


def list_places(peer: Peer, me: PeerId) -> list[tuple[int, int]]:
    """Its place among the contributors of each certified round that counted it, by its own ledger."""
    places = []
    with open_archive(peer.folder) as archive:
        for number in range(1, archive.certificates.newest + 1):
            contributors = list_contributors(archive.certificate(number).result)
            if me in contributors:
                places.append((contributors.index(me), len(contributors)))
    return places


def test_nothing_is_drawn_by_two_who_share_the_same_text(swarm: Swarm) -> None:
    allow = ("--allow-task", TASK)
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest), *allow)
    swarm.wait("the first peer answers", lambda: first.status() is not None)
    status = first.status()
    assert status is not None
    peers = first, swarm.add("peer2").start("join", status.uri, *allow)

    ids = [find_id(peer) for peer in peers]

    def have_drawn() -> bool:
        divided = [[one for one in read_shares(swarm.folder / me.hex()) if one.places == 2] for me in ids]
        return all(len(own) >= SHARES_WANTED and count(own) >= WINDOWS_WANTED for own in divided)

    swarm.wait("both have drawn from some shares", have_drawn)
    for peer in peers:
        assert peer.leave() == 0, peer.log()[-2000:]
        assert "Traceback" not in peer.log(), peer.log()

    own, others = (read_shares(swarm.folder / me.hex()) for me in ids)
    for peer, me, shares in zip(peers, ids, (own, others), strict=True):
        given = [(one.place, one.places) for one in shares[1:]]
        assert given == list_places(peer, me)[: len(given)], "as everybody reads it in the certified rounds"
    for place in (0, 1):
        mine = draw_from(own, place)
        assert mine.isdisjoint(draw_from(others, 1 - place))


def draw_from(shares: list[Share], place: int) -> set[str]:
    return {window for one in shares if (one.place, one.places) == (place, 2) for window in one.windows}


def count(shares: list[Share]) -> int:
    return sum(len(one.windows) for one in shares)
