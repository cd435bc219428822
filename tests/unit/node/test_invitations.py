"""Invitations at the edge: the owner's command, the URI, and the file that a joiner keeps."""

import stat
import time
from pathlib import Path

import pytest

from shoal.node.cli import main
from shoal.node.config import MANIFEST_FILE, NodeConfig, NodeTable
from shoal.node.invitations import DAY_S, PROOF_FILE, load_proof, make_invitation
from shoal.protocol.admission import AdmissionProof, issue_ticket, verify_proof
from shoal.protocol.errors import ConfigError
from shoal.protocol.identity import format_peer_id
from shoal.protocol.manifest import SwarmUri, parse_uri
from tests.unit.node.node_samples import Swarm, make_samples
from tests.unit.node.test_decrees import find_seed, make_key
from tests.unit.protocol.samples import IDENTITIES, OTHER_SWARM, PEERS

OWNER, JOINER = IDENTITIES[0], IDENTITIES[3]
BOOTSTRAP = f"/ip4/203.0.113.5/tcp/9460/p2p/{format_peer_id(PEERS[1])}"


def make_folder(path: Path, rule: str) -> tuple[Path, Swarm]:
    """The folder of a peer of the owner's."""
    swarm = make_samples(admission=rule)
    path.mkdir()
    (path / MANIFEST_FILE).write_bytes(swarm.signed)
    make_key(path / "owner.key", find_seed())
    return path, swarm


def configure(folder: Path, uri: SwarmUri | None = None) -> NodeConfig:
    folder.mkdir(exist_ok=True)
    return NodeConfig(node=NodeTable(data_dir=str(folder), swarm=None if uri is None else str(uri)))


def load(folder: Path, swarm: Swarm, uri: SwarmUri | None = None) -> AdmissionProof | None:
    return load_proof(configure(folder, uri), JOINER.peer, swarm.manifest, swarm.id)


def test_an_invitation_goes_from_the_owner_to_the_joiners_folder(tmp_path: Path) -> None:
    folder, swarm = make_folder(tmp_path / "peer", "invited")
    uri = make_invitation(folder, folder / "owner.key", (BOOTSTRAP,), 2.0)
    assert uri == parse_uri(str(uri)) and (uri.swarm, uri.bootstraps) == (swarm.id, (BOOTSTRAP,))
    assert uri.ticket is not None and abs(uri.ticket.expires_s - time.time() - 2 * DAY_S) < 60
    proof = load(tmp_path / "joiner", swarm, uri)
    assert proof is not None
    verify_proof(proof, JOINER.peer, OWNER.peer, swarm.id)
    kept = tmp_path / "joiner" / PROOF_FILE
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert uri.ticket.seed not in kept.read_bytes(), "whoever reads it cannot let others in"
    assert [one.name for one in kept.parent.iterdir()] == [PROOF_FILE]
    assert load(tmp_path / "joiner", swarm) == proof, "it is shown from then on"
    assert load(tmp_path / "joiner", swarm, SwarmUri(swarm=swarm.id)) == proof
    newer = make_invitation(folder, folder / "owner.key", (), 3.0)
    assert load(tmp_path / "joiner", swarm, newer) != proof


@pytest.mark.parametrize("rule", ["open", "listed"])
def test_nobody_shows_an_invitation_where_none_is_asked_for(tmp_path: Path, rule: str) -> None:
    folder, swarm = make_folder(tmp_path / "peer", rule)
    ticket = issue_ticket(OWNER, swarm.id, b"t" * 32, 2**40)
    assert load(tmp_path / "joiner", swarm, SwarmUri(swarm=swarm.id, ticket=ticket)) is None
    assert not (tmp_path / "joiner" / PROOF_FILE).exists()
    with pytest.raises(ConfigError, match="nobody is asked for an invitation"):
        make_invitation(folder, folder / "owner.key", (), 1.0)


@pytest.mark.parametrize("days", [0.0, -1.0, 4000.0, float("nan")])
def test_an_invitation_has_an_end(tmp_path: Path, days: float) -> None:
    folder, _ = make_folder(tmp_path / "peer", "invited")
    with pytest.raises(ConfigError, match="is out of range"):
        make_invitation(folder, folder / "owner.key", (), days)


def test_an_invitation_of_another_owner_or_swarm_is_named_at_once(tmp_path: Path) -> None:
    _, swarm = make_folder(tmp_path / "peer", "invited")
    for owner, swarm_id in ((JOINER, swarm.id), (OWNER, OTHER_SWARM)):
        ticket = issue_ticket(owner, swarm_id, b"t" * 32, 2**40)
        with pytest.raises(ConfigError, match="not signed by this swarm's owner"):
            load(tmp_path / "joiner", swarm, SwarmUri(swarm=swarm.id, ticket=ticket))
    assert not (tmp_path / "joiner" / PROOF_FILE).exists()


def test_a_kept_proof_that_is_damaged_or_of_another_peer_is_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, swarm = make_folder(tmp_path / "peer", "invited")
    joiner = tmp_path / "joiner"
    assert load(joiner, swarm, make_invitation(folder, folder / "owner.key", (), 1.0)) is not None
    assert load_proof(configure(joiner), PEERS[5], swarm.manifest, swarm.id) is None
    (joiner / PROOF_FILE).write_bytes(b"?" * 5000)
    assert load(joiner, swarm) is None
    assert caplog.text.count("join with the invitation's URI again") == 2


def test_an_invitation_that_has_ended_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, swarm = make_folder(tmp_path / "peer", "invited")
    ticket = issue_ticket(OWNER, swarm.id, b"t" * 32, 1000)
    assert load(tmp_path / "joiner", swarm, SwarmUri(swarm=swarm.id, ticket=ticket)) is not None
    assert "has ended; ask the swarm's owner" in caplog.text


def test_the_command_prints_the_uri(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, swarm = make_folder(tmp_path / "peer", "invited")
    assert main(["swarm", "invite", "--data-dir", str(folder), "--days", "7", "--bootstrap", BOOTSTRAP]) == 0
    told = capsys.readouterr().out
    uri = parse_uri(told.split("shoal join '")[1].split("'")[0])
    assert uri.swarm == swarm.id and uri.bootstraps == (BOOTSTRAP,) and uri.ticket is not None
    assert format_peer_id(uri.ticket.invitation.ticket) in told
    assert main(["swarm", "invite", "--data-dir", str(folder)]) == 0
    assert "no address of a member is in it" in capsys.readouterr().out
    assert main(["swarm", "invite", "--data-dir", str(tmp_path)]) == 1
    assert "holds no manifest" in capsys.readouterr().err
