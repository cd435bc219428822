"""Swarms that are not open: a stranger is refused and told why, the owner lets it in, an invitation does so at once."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.swarm import DRAFT, Peer, Swarm, run


@pytest.fixture
def swarm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Swarm]:
    made = Swarm(tmp_path, founders=2, draft=f'{DRAFT}\n[admission]\nrule = "{request.param}"\n')
    yield made
    made.end()


def start_founders(swarm: Swarm) -> tuple[Peer, Peer, str]:
    """Both founders with a round behind them, and the swarm's plain URI."""
    first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest))
    uri = first.ask().uri
    second = swarm.add("peer2").start("join", uri)
    swarm.wait("a round", lambda: min(first.round, second.round) >= 1)
    return first, second, uri


def refused(peer: Peer) -> bool:
    return any(one.startswith("not_admitted: this peer") for one in peer.ask().warnings)


def sees(peer: Peer, name: str) -> bool:
    return any(row.name == name and row.alive for row in peer.ask().peers)


@pytest.mark.parametrize("swarm", ["listed"], indirect=True)
def test_a_listed_swarm_refuses_a_stranger_until_the_owner_admits_it(swarm: Swarm) -> None:
    first, second, uri = start_founders(swarm)
    stranger = swarm.add("peer3").start("join", uri)
    swarm.wait("its status says that it is refused", lambda: refused(stranger))
    step = f"shoal swarm admit {stranger.ask().peer}"
    told = f"not_admitted; ask the swarm's owner for `{step}`"
    swarm.wait("a member has told it, and it says what to do", lambda: told in stranger.log())
    swarm.wait("the members' log says what they did", lambda: "not_admitted" in first.log() + second.log())
    at = second.head
    swarm.wait("the others go on without it", lambda: min(first.round, second.round) >= at + 1)
    assert not sees(first, "peer3") and not sees(second, "peer3")
    assert "certified" not in stranger.log()

    assert first.leave() == 0, first.log()[-2000:]
    done = run(*step.split()[1:], "--data-dir", str(first.folder))
    assert done.returncode == 0, done.stderr
    first.start("up")
    at = second.head
    swarm.wait("it is let in without a restart, and contributes", lambda: stranger.contributes_after(at))
    swarm.wait("it says no more that it is refused", lambda: not refused(stranger))
    swarm.wait("everybody sees it", lambda: sees(first, "peer3") and sees(second, "peer3"))
    swarm.check_roots()


@pytest.mark.parametrize("swarm", ["invited"], indirect=True)
def test_who_has_an_invitation_is_in_at_once_and_stays_over_a_restart(swarm: Swarm) -> None:
    first, second, uri = start_founders(swarm)
    done = run("swarm", "invite", "--data-dir", str(first.folder), "--days", "1")
    assert done.returncode == 0, done.stderr
    invitation = done.stdout.split("shoal join '")[1].split("'")[0]
    uninvited = swarm.add("peer4").start("join", uri)
    guest = swarm.add("peer3").start("join", invitation)
    swarm.wait("the guest contributes", lambda: guest.contributes_after(0))
    assert "refuses this peer" not in guest.log()
    swarm.wait("both founders see it", lambda: sees(first, "peer3") and sees(second, "peer3"))
    kept = guest.folder / "invitation"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    secret = invitation.split("invite=")[1]
    assert not any(secret in peer.log() for peer in swarm.peers), "nobody prints it"

    guest.kill()
    guest.start("up")
    at = second.head
    swarm.wait("it is in again without the URI", lambda: guest.contributes_after(at))
    swarm.wait("who has none is refused", lambda: refused(uninvited))
    assert not sees(first, "peer4") and not sees(second, "peer4") and not sees(guest, "peer4")
    swarm.check_roots()
