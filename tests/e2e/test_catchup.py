"""Catch-up between real processes over a made-up log: donors that die, restart or lie, and a joiner that is killed."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.flipped_bytes import count_refusals
from tests.e2e.certified_log import Log, fill_folder, make_log
from tests.e2e.log_peer import LogPeer
from tests.e2e.shaping_proxy import choose_port

pytestmark = pytest.mark.alone

ELEMENTS = 1_500_000
ROUNDS = 24
SNAPSHOT = 22
STATE_BYTES = 8 * ELEMENTS
RATE = 3e6  # slow enough that there is a middle of a fetch
WAIT_S = 180.0  # generous: it is waited for what comes in the end or never
POLL_S = 0.05
WASTE_BYTES = 12 << 20  # what may be under way when somebody is killed: two windows


class Scene:
    """The processes of one test."""

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder = folder
        self.log = log
        self.ports: set[int] = set()
        self.donors: list[LogPeer] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.joiner: LogPeer

    def add_donor(
        self,
        *,
        rate: float = RATE,
        lies: bool = False,
        stalls_after: int = -1,
        snapshots: Sequence[int] = (SNAPSHOT,),
        updates_after: int = 0,
    ) -> LogPeer:
        folder = self.folder / f"donor{len(self.donors)}"
        fill_folder(self.log, folder, ROUNDS, updates_after=updates_after, snapshots=snapshots)
        donor = LogPeer(
            data_dir=str(folder),
            control_port=choose_port(self.ports),
            tensor_port=choose_port(self.ports),
            bootstraps=tuple(one.address for one in self.donors),
            rate=rate,
            lies=lies,
            stalls_after=stalls_after,
        )
        self.donors.append(donor)
        self.start(donor)
        self.wait("a donor is ready", lambda: bool(donor.events("ready")))
        return donor

    def add_joiner(self, head: int) -> LogPeer:
        folder = self.folder / "joiner"
        fill_folder(self.log, folder, head, updates_after=head, snapshots=[head] if head else [])
        self.joiner = LogPeer(
            data_dir=str(folder),
            control_port=choose_port(self.ports),
            tensor_port=choose_port(self.ports),
            bootstraps=tuple(one.address for one in self.donors),
            donors=len(self.donors),
        )
        self.start(self.joiner)
        return self.joiner

    def start(self, peer: LogPeer) -> None:
        self.processes[peer.data_dir] = peer.start()

    def kill(self, peer: LogPeer) -> None:
        """SIGKILL."""
        process = self.processes.pop(peer.data_dir)
        process.kill()
        process.wait(WAIT_S)

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                peers = [*self.donors, *([self.joiner] if hasattr(self, "joiner") else [])]
                logs = "\n".join(f"--- {peer.data_dir}\n{peer.log()[-2500:]}" for peer in peers)
                raise AssertionError(f"not within {WAIT_S:.0f} s: {what}\n{logs}")
            time.sleep(POLL_S)

    def served_bytes(self, donor: LogPeer) -> int:
        return sum(one["nbytes"] for one in donor.events("served"))

    def held_bytes(self, joiner: LogPeer) -> int:
        """What a joiner has fetched so far, as the disk tells it. The file of a snapshot in work is sparse."""
        folder = Path(joiner.data_dir)
        partial = sum(path.stat().st_blocks * 512 for path in folder.glob("catchup/*.partial"))
        whole = [path.stat().st_size for path in folder.glob("blobs/??/*") if not path.suffix]
        return max(0, partial - (1 << 20)) + sum(whole)

    def way_bytes(self) -> int:
        """What the way takes that the joiner has chosen last, from round 0. After a donor's death that may be another
        one than before: on a busy machine the little that had come by then misleads it."""
        (*_, way) = (line for line in self.joiner.log().splitlines() if f"from round 0 to {ROUNDS}:" in line)
        return STATE_BYTES + 2 * self.log.update_bytes if "the snapshot" in way else ROUNDS * self.log.update_bytes

    def wait_until_caught_up(self) -> None:
        """Until the joiner tells of a catch-up that led to the head: the state there is the certified one."""
        self.wait(
            "the joiner is at the head", lambda: any(one["head"] == ROUNDS for one in self.joiner.events("ended"))
        )
        assert self.joiner.events("ended")[-1]["root"] == self.log.roots[ROUNDS].hex()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return make_log(tmp_path_factory.mktemp("log"), ELEMENTS, ROUNDS, snapshots=[16, SNAPSHOT], parts=12)


@pytest.fixture
def scene(tmp_path: Path, log: Log) -> Iterator[Scene]:
    one = Scene(tmp_path, log)
    try:
        yield one
    finally:
        for process in one.processes.values():
            process.kill()
            process.wait(WAIT_S)


def test_a_donor_is_killed_in_the_middle_of_a_snapshot(scene: Scene) -> None:
    first, second = scene.add_donor(), scene.add_donor()
    scene.add_joiner(0)
    scene.wait("the first donor serves", lambda: len(first.events("served")) >= 3)
    scene.kill(first)
    scene.wait_until_caught_up()
    fetched = scene.served_bytes(first) + scene.served_bytes(second)
    assert fetched <= scene.way_bytes() + WASTE_BYTES


def test_a_liar_is_charged_and_what_it_sends_is_not_used(scene: Scene) -> None:
    honest, liar = scene.add_donor(), scene.add_donor(rate=0.0, lies=True)
    joiner = scene.add_joiner(0)
    scene.wait_until_caught_up()
    assert "over a tensor link" in joiner.log() and "wrong_digest" in joiner.log()
    assert 0 < scene.served_bytes(liar) <= WASTE_BYTES
    assert scene.served_bytes(honest) >= STATE_BYTES


def test_a_donor_that_stalls_does_not_hold_up_the_others(scene: Scene) -> None:
    scene.add_donor()
    stalling = scene.add_donor(stalls_after=2)
    scene.add_joiner(0)
    scene.wait_until_caught_up()
    assert len(stalling.events("served")) <= 2


@pytest.mark.parametrize(("head", "nbytes", "pieces"), [(0, STATE_BYTES, 6), (16, 0, 40)], ids=["snapshot", "replay"])
def test_a_joiner_that_is_killed_goes_on_where_it_was(scene: Scene, head: int, nbytes: int, pieces: int) -> None:
    # There is one way only. And the donor stops in the middle of it, so that this is where the joiner is killed.
    way = {"snapshots": [SNAPSHOT], "updates_after": SNAPSHOT} if nbytes else {"snapshots": ()}
    donor = scene.add_donor(rate=0.0, stalls_after=pieces, **way)
    joiner = scene.add_joiner(head)
    scene.wait("pieces are there", lambda: scene.held_bytes(joiner) >= 3e6)
    scene.kill(joiner)
    scene.kill(donor)
    held = scene.held_bytes(joiner)
    before = joiner.events("ended")
    assert all(one["head"] < ROUNDS for one in before)
    scene.start(replace(donor, stalls_after=-1))
    scene.start(joiner)
    scene.wait_until_caught_up()
    total = (nbytes + 2 * scene.log.update_bytes) if nbytes else (ROUNDS - head) * scene.log.update_bytes
    assert scene.served_bytes(donor) <= total + WASTE_BYTES
    fetched = sum(one["nbytes"] for one in joiner.events("ended")[len(before) :])
    assert fetched <= total - held, "what was there is not fetched again"


def test_the_only_donor_is_killed_and_comes_back(scene: Scene) -> None:
    donor = scene.add_donor()
    scene.add_joiner(0)
    scene.wait("chunks are there", lambda: len(donor.events("served")) >= 4)
    scene.kill(donor)
    scene.start(donor)
    scene.wait_until_caught_up()
    assert scene.served_bytes(donor) <= scene.way_bytes() + WASTE_BYTES


def test_no_flipped_byte_is_believed(tmp_path: Path) -> None:
    counts = count_refusals(tmp_path, 700)
    assert {kind: count["believed"] for kind, count in counts.items()} == dict.fromkeys(counts, 0)
    assert len(counts) == 7 and all(count["tried"] == 100 for count in counts.values())
