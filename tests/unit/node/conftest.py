"""A whole Status, as a daemon in the middle of a run would give it."""

import math

import pytest

from shoal.node.happenings import Happening, HappeningKind, Severity
from shoal.node.port_mapping import MappingState
from shoal.node.reachability import NatMapping, ReachReason, ReachState
from shoal.node.status import (
    AddressStatus,
    CatchUpStatus,
    DiskStatus,
    FailureStatus,
    LineStatus,
    LossPoint,
    Measured,
    PeerStatus,
    ReachStatus,
    ReasonCount,
    RoundStatus,
    RouterStatus,
    Status,
    TrafficStatus,
    TrainerState,
    TrainingStatus,
    Wait,
)
from shoal.protocol.identity import Identity, format_peer_id

NAMES = ("heron", "otter", "pike", "", "gull")
PEERS = [format_peer_id(Identity(bytes([number]) * 32).peer) for number in range(len(NAMES))]
START_S = 1_760_000_000.0


def make_row(number: int) -> PeerStatus:
    alive = number != 4
    return PeerStatus(
        peer=PEERS[number],
        name=NAMES[number],
        agent="shoal/0.1.0",
        me=number == 0,
        alive=alive,
        ready=alive and number != 2,
        participating=number < 2,
        voter=number < 3,
        owner=number != 2,
        tokens_per_s=18_400.0 / (number + 1) if alive else 0.0,
        head_round=127 if alive else 119,
        address=f"203.0.113.{number}:9461",
        path="" if number in (0, 4) else "direct",
    )


def make_happenings() -> tuple[Happening, ...]:
    texts = [
        (Severity.INFO, HappeningKind.ROUND_CERTIFIED, "round 126 is certified: 4 peers, 41 k tokens"),
        (Severity.WARNING, HappeningKind.PEER_LOST, "gull is gone: peer_lost; the others go on"),
        (Severity.WARNING, HappeningKind.PART_REASSIGNED, "4 parts of round 127 went from gull to otter: owner_lost"),
        (Severity.INFO, HappeningKind.ROUND_CERTIFIED, "round 127 is certified: 3 peers, 35 k tokens"),
        (Severity.ERROR, HappeningKind.DISK, "the disk is nearly full: 0.9 GiB free"),
    ]
    return tuple(
        Happening(at_s=START_S + 9 * index, severity=severity, kind=kind, text=text)
        for index, (severity, kind, text) in enumerate(texts)
    )


@pytest.fixture
def status() -> Status:
    history = [(number, 1.9 + 3.6 * math.exp(-number / 25) + 0.03 * math.sin(number * 2.1)) for number in range(1, 128)]
    return Status(
        version="0.1.0",
        peer=PEERS[0],
        name=NAMES[0],
        swarm="5f" * 32,
        swarm_name="tiny",
        uri=f"shoal://{'5f' * 32}?bootstrap=/ip4/203.0.113.5/tcp/9460/p2p/{PEERS[1]}",
        role="trainer",
        at_s=START_S + 60,
        uptime_s=11_573.4,
        joined=True,
        leaving=False,
        control_up=True,
        round=RoundStatus(
            round=128,
            attempt=1,
            phase="exchange",
            phase_s=46.8,
            progress=0.62,
            deadline_s=13.2,
            deadline="exchange_timeout_s",
            waiting_for=(Wait(peer=PEERS[1], name=NAMES[1]), Wait(peer=PEERS[3], name=NAMES[3])),
            voters=3,
            voters_live=3,
            votes_needed=2,
            head_digest="c0ffee" * 10 + "c0ff",
            state_root="1b" * 32,
        ),
        training=TrainingStatus(
            state=TrainerState.RUNNING,
            device="NVIDIA GeForce RTX 3060",
            restarts=1,
            error="",
            steps=20,
            steps_planned=20,
            tokens=5_214_208,
            tokens_per_s=18_412.7,
            loss_first=history[0][1],
            loss_last=history[-1][1],
            loss_unit="nats a token",
            loss_history=tuple(LossPoint(round=number, loss=loss) for number, loss in history),
        ),
        measured=(
            Measured(
                round=124, loss=1.934, perplexity=6.917, tokens=32_768, peer=PEERS[1], name=f"otter ({PEERS[1][-8:]})"
            ),
            Measured(round=120, loss=1.951, perplexity=None, tokens=32_768, peer=PEERS[0], name="this peer"),
        ),
        traffic=TrafficStatus(
            control_sent_bytes=4_100_233,
            control_received_bytes=5_333_874,
            tensor_sent_bytes=412_313_000,
            tensor_received_bytes=398_773_141,
            contribution_bytes=134_000_000,
            fp32_bytes=528_000_000,
        ),
        line=LineStatus(
            upload_cap_mbit=5.0, caps_until="18:00", sent_mbit=4.62, received_mbit=0.314, relay_withheld=True
        ),
        catch_up=CatchUpStatus(active=False, rounds_behind=0, detail=""),
        disk=DiskStatus(
            failing=False,
            errors=0,
            free_bytes=212_000_000_000,
            blob_bytes=91_300_000,
            ledger_entries=1_382,
            snapshot_round=120,
            oldest_round=60,
        ),
        reach=ReachStatus(
            state=ReachState.REACHABLE,
            reason=ReachReason.DIALLED_BACK,
            mapping=NatMapping.ENDPOINT_INDEPENDENT,
            addresses=(
                AddressStatus(address="203.0.113.7:9461", state=ReachState.REACHABLE, reason=ReachReason.DIALLED_BACK),
                AddressStatus(
                    address="192.168.1.5:9461", state=ReachState.PRIVATE, reason=ReachReason.DIAL_BACK_FAILED
                ),
            ),
        ),
        router=RouterStatus(
            state=MappingState.MAPPED,
            reason="",
            detail="the router 192.168.1.1 maps by nat_pmp: 203.0.113.7:9461 leads to the tensor port 9461",
            addresses=("203.0.113.7:9461",),
        ),
        peers=tuple(make_row(number) for number in range(len(NAMES))),
        rounds_certified=127,
        aborted=(ReasonCount(reason="owner_lost", count=2), ReasonCount(reason="proposer_lost", count=1)),
        failures=(
            FailureStatus(
                kind=HappeningKind.PART_REASSIGNED,
                reason="owner_lost",
                peer=f"gull ({PEERS[4][-8:]})",
                round=127,
                attempt=0,
                age_s=42.0,
                remedy="its parts go to other owners",
            ),
            FailureStatus(
                kind=HappeningKind.ATTEMPT_FAILED,
                reason="proposer_silent",
                peer=f"otter ({PEERS[1][-8:]})",
                round=120,
                attempt=2,
                age_s=950.0,
                remedy="the next proposer takes over",
            ),
        ),
        warnings=("your upload is 3.1 Mbit/s: contributions take 12 s of each round",),
        happenings=make_happenings(),
    )
