"""Holes for tensor links through real routers, agreed on over the relayed control plane."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.protocol.errors import Failure
from tests.natlab.lab import Lab
from tests.natlab.rules import Nat

TRIES = 3
TIMEOUT_S = 240.0


@pytest.mark.parametrize(
    ("left", "right", "outcome"),
    [
        (Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED, "punched"),
        pytest.param(Nat.PORT_RESTRICTED, Nat.SYMMETRIC, "relayed", marks=pytest.mark.long),
    ],
    ids=["can be punched", "cannot"],
)
def test_a_hole_is_punched_where_the_routers_allow_it_and_else_a_member_relays(
    tmp_path: Path, left: Nat, right: Nat, outcome: str
) -> None:
    with Lab() as lab:
        for name in ("relay", "witness"):
            lab.add_host(name).popen(sys.executable, "-m", "tests.natlab.punch_peer", name, str(tmp_path))
        lab.add_peer("right", right).popen(sys.executable, "-m", "tests.natlab.punch_peer", "right", str(tmp_path))
        command = (sys.executable, "-m", "tests.natlab.punch_peer", "left", str(tmp_path), "right", str(TRIES))
        dialler = lab.add_peer("left", left).popen(*command, stdout=subprocess.PIPE)
        told = dialler.communicate(timeout=TIMEOUT_S)[0].decode().splitlines()
        (tmp_path / "done").write_text("")
        tried = [line.split() for line in told if line.split()[0] in ("direct", "punched", "relayed", *Failure)]
        print(tried)
        assert [word for word, _ in tried] == [outcome] * TRIES, told
