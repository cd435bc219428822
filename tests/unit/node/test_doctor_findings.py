"""What the doctor says of a machine: the verdict, the words, and the exact next step of every finding."""

import json
from dataclasses import replace

import pytest

from shoal.node.config import NodeConfig, NodeTable, StoreTable, TrainerTable
from shoal.node.doctor_findings import (
    AGAIN,
    Check,
    ClockSeen,
    ConfigFault,
    DeviceSeen,
    DiskSeen,
    Finding,
    IdentitySeen,
    ModelSeen,
    TorchSeen,
    Unknown,
    Verdict,
    VersionsSeen,
    can_take_part,
    count,
    judge_clock,
    judge_configuration,
    judge_disk,
    judge_identity,
    judge_memory,
    judge_torch,
    judge_versions,
    list_words,
    not_checked,
    ok,
    order,
    parse_agent,
    parse_version,
    problem,
    to_json_tree,
    warning,
)
from shoal.node.machine_memory import MachineMemory

GIB = 2**30
CONFIG = NodeConfig()
MODEL = ModelSeen(name="m", parameters=100_000_000, contribution_bytes=100_000_000, exchange_timeout_s=60.0)
DISK = DiskSeen(folder="/data", free_bytes=100 * GIB, write_bytes_per_s=100e6)
GPU = DeviceSeen(name="H200", total_bytes=140 * GIB, free_bytes=100 * GIB)
TORCH = TorchSeen(version="2.9.0", cuda_built=True, devices=(GPU,), driver="570.1")
VERSIONS = VersionsSeen(python="3.11.7", shoal="0.2.0", libp2p="0.8.1", libp2p_wanted="0.8.1", protocol=1)


def expect(finding: Finding, check: Check, verdict: Verdict, text: str, step: str = "") -> None:
    assert finding.check is check
    assert finding.verdict is verdict, finding
    assert text in finding.text, finding.text
    assert step in finding.next_step, finding.next_step


def device_config(device: str) -> NodeConfig:
    return NodeConfig(trainer=TrainerTable(device=device))


# -- the vocabulary --------------------------------------------------------------------------------------------------


def test_a_finding_has_a_next_step_exactly_where_something_is_to_be_done() -> None:
    with pytest.raises(AssertionError):
        Finding(check=Check.DISK, verdict=Verdict.PROBLEM, text="it is full")
    with pytest.raises(AssertionError):
        Finding(check=Check.DISK, verdict=Verdict.OK, text="fine", next_step="do something")
    assert not_checked(Check.DHT, Unknown(why="no time")).next_step == AGAIN


def test_only_a_problem_stands_in_the_way() -> None:
    rest = [
        ok(Check.DISK, "x"),
        warning(Check.CLOCK, "x", "y"),
        not_checked(Check.DHT, Unknown(why="x")),
    ]
    assert can_take_part(rest) and can_take_part([])
    assert not can_take_part([*rest, problem(Check.DISK, "x", "y")])


def test_the_table_is_in_the_order_of_the_checks_and_keeps_the_order_within_one() -> None:
    first, second = ok(Check.BOOTSTRAP, "a"), ok(Check.BOOTSTRAP, "b")
    identity, rates = ok(Check.IDENTITY, "i"), ok(Check.BANDWIDTH, "r")
    assert order([rates, first, identity, second]) == [identity, first, second, rates]


def test_json_says_the_same() -> None:
    tree = to_json_tree([problem(Check.DISK, "full", "make space")], peer="p", took_s=float("nan"))
    assert json.loads(json.dumps(tree, allow_nan=False)) == {
        "peer": "p",
        "took_s": None,
        "findings": [{"check": "disk", "verdict": "problem", "text": "full", "next_step": "make space"}],
    }


def test_words() -> None:
    assert (count(1, "peer"), count(0, "peer"), count(2, "peer")) == ("1 peer", "0 peers", "2 peers")
    assert list_words(["a", "b"]) == "a, b"
    assert list_words(list("abcdef")) == "a, b, c, d and 2 more"


# -- identity and configuration --------------------------------------------------------------------------------------


def test_identity() -> None:
    seen = IdentitySeen(path="/d/identity.key", peer="12D3")
    expect(judge_identity(seen), Check.IDENTITY, Verdict.OK, "12D3, readable by this user alone (mode 0600)")
    assert "running" not in judge_identity(seen).text
    expect(judge_identity(replace(seen, in_use=True)), Check.IDENTITY, Verdict.OK, "in use by the running daemon")
    expect(judge_identity(replace(seen, peer="")), Check.IDENTITY, Verdict.OK, "the first start makes it")
    open_to_all = replace(
        seen, peer="", fault="can be read by others (mode 0644)", fix="run: chmod 600 /d/identity.key"
    )
    expect(
        judge_identity(open_to_all), Check.IDENTITY, Verdict.PROBLEM, "(mode 0644)", "run: chmod 600 /d/identity.key"
    )


def test_configuration() -> None:
    expect(judge_configuration("a.toml", None), Check.CONFIGURATION, Verdict.OK, "a.toml: every value is usable")
    expect(
        judge_configuration("a.toml", None, ("trainer.weights",)),
        Check.CONFIGURATION,
        Verdict.WARNING,
        "a.toml: trainer.weights is set, and the task of this swarm does not use it",
        "take it out, unless the file serves other swarms, too",
    )
    fault = ConfigFault(field="tensor.port", fault="is 70000", fix="give a port below 65536")
    expect(
        judge_configuration("a.toml", fault),
        Check.CONFIGURATION,
        Verdict.PROBLEM,
        "tensor.port: is 70000",
        "give a port below 65536",
    )


# -- the clock -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("synchronized", "ahead_s", "verdict", "text", "step"),
    [
        (True, (), Verdict.OK, "keeps it synchronized", ""),
        (None, (), Verdict.NOT_CHECKED, "does not say", "date -u"),
        (False, (), Verdict.WARNING, "does not keep it synchronized", "timedatectl set-ntp true"),
        (False, (0.2,), Verdict.OK, "within 0.2 s of 1 peer", ""),
        (True, (-29.0, 1.0, 2.0), Verdict.OK, "within 1.0 s of 3 peers", ""),
        (True, (0.0,), Verdict.OK, "within 0.1 s", ""),
        (True, (31.0, 40.0), Verdict.WARNING, "36 s behind 2 peers", "timedatectl"),
        (None, (-50.0,), Verdict.WARNING, "50 s ahead of 1 peer", "timedatectl"),
        (True, (7200.0, 7200.0, 0.0), Verdict.PROBLEM, "7200 s behind 3 peers", "timedatectl"),
        # One peer with a wrong clock among good ones is that peer's trouble.
        (True, (0.0, 0.1, 7200.0), Verdict.OK, "within 0.1 s of 3 peers", ""),
    ],
)
def test_clock(synchronized: bool | None, ahead_s: tuple[float, ...], verdict: Verdict, text: str, step: str) -> None:
    expect(judge_clock(ClockSeen(synchronized=synchronized, ahead_s=ahead_s)), Check.CLOCK, verdict, text, step)


# -- the disk --------------------------------------------------------------------------------------------------------


def test_a_disk_with_room_and_speed_is_well() -> None:
    expect(judge_disk(DISK, CONFIG, MODEL), Check.DISK, Verdict.OK, "107 GB free in /data, 100 MB/s written")
    expect(judge_disk(DISK, CONFIG, None), Check.DISK, Verdict.OK, "107 GB free")


def test_a_disk_that_cannot_be_written_stands_in_the_way() -> None:
    seen = replace(DISK, fault="Permission denied", folder="/my data")
    expect(
        judge_disk(seen, CONFIG, None), Check.DISK, Verdict.PROBLEM, "Permission denied", "chown -R $USER '/my data'"
    )


def test_a_disk_below_the_configured_minimum_stands_in_the_way() -> None:
    config = NodeConfig(store=StoreTable(free_gib_min=5.0))
    seen = replace(DISK, free_bytes=5 * GIB - 1)
    expect(
        judge_disk(seen, config, None), Check.DISK, Verdict.PROBLEM, "store.free_gib_min = 5 GiB", "store.free_gib_min"
    )
    assert judge_disk(replace(seen, free_bytes=5 * GIB), config, None).verdict is Verdict.OK


def test_a_disk_too_small_for_the_model_is_told_how_much_it_takes() -> None:
    # (2 + 3) snapshots of 8 bytes, 32 for the trainer: 7.2 GB, and 1 GiB stays free.
    seen = replace(DISK, free_bytes=7_200_000_000 + GIB - 1)
    expect(judge_disk(seen, CONFIG, MODEL), Check.DISK, Verdict.WARNING, "about 7.2 GB more", "store.snapshots_kept")
    assert judge_disk(replace(seen, free_bytes=seen.free_bytes + 1), CONFIG, MODEL).verdict is Verdict.OK
    assert judge_disk(replace(seen, used_bytes=1000), CONFIG, MODEL).verdict is Verdict.OK
    bootstrap = NodeConfig(node=NodeTable(role="bootstrap"))
    assert judge_disk(seen, bootstrap, MODEL).verdict is Verdict.OK


def test_vectors_on_the_disk_count_for_the_disk() -> None:
    config = NodeConfig(store=StoreTable(vectors="disk"))
    seen = replace(DISK, free_bytes=8_400_000_000 + GIB - 1)
    expect(judge_disk(seen, config, MODEL), Check.DISK, Verdict.WARNING, "about 8.4 GB more")
    assert judge_disk(replace(seen, free_bytes=seen.free_bytes + 1), config, MODEL).verdict is Verdict.OK


# -- memory ----------------------------------------------------------------------------------------------------------


def judge(
    total_bytes: int, available_bytes: int | None = None, vectors: str = "memory", role: str = "trainer", **how: bool
) -> Finding:
    """0.25 GB for the daemon, 0.3 for what is encoded, 1.2 for the vectors; on a CPU 1.6 for the trainer's own."""
    seen = MachineMemory(total_bytes=total_bytes, available_bytes=available_bytes or total_bytes)
    config = NodeConfig(node=NodeTable(role=role), store=StoreTable(vectors=vectors))
    return judge_memory(seen, config, MODEL, on_cpu=how.get("on_cpu", False), running=how.get("running", False))


def test_memory_that_holds_the_model_is_well() -> None:
    text = "1.8 GB in all, 1.8 GB to be had; the swarm's model takes about 1.8 GB of it"
    expect(judge(1_750_000_000), Check.MEMORY, Verdict.OK, text)
    seen = MachineMemory(total_bytes=1, available_bytes=1)
    assert judge_memory(seen, CONFIG, None, on_cpu=True, running=False).verdict is Verdict.OK
    assert judge(1_050_000_000, role="bootstrap").verdict is Verdict.OK


def test_a_model_that_memory_does_not_hold_can_have_its_vectors_on_the_disk() -> None:
    expect(judge(1_749_999_999), Check.MEMORY, Verdict.PROBLEM, "takes about 1.8 GB", 'vectors = "disk" under [store]')
    text = "takes about 550 MB of it, and 1.2 GB of the disk"
    expect(judge(1_749_999_999, vectors="disk"), Check.MEMORY, Verdict.OK, text)


def test_a_model_that_is_too_large_either_way_is_said_to_be() -> None:
    for vectors in ("memory", "disk"):
        text = "takes about 1.8 GB" if vectors == "memory" else "takes about 550 MB"
        expect(judge(549_999_999, vectors=vectors), Check.MEMORY, Verdict.PROBLEM, text, "a smaller model")
    expect(judge(2_149_999_999, on_cpu=True), Check.MEMORY, Verdict.PROBLEM, "about 3.4 GB", "a smaller model")
    assert judge(2_150_000_000, on_cpu=True, vectors="disk").verdict is Verdict.OK


def test_memory_that_others_take_is_a_warning_unless_the_daemon_runs_already() -> None:
    expect(judge(4 * GIB, GIB), Check.MEMORY, Verdict.WARNING, "1.1 GB to be had", "end what else")
    assert judge(4 * GIB, GIB, running=True).verdict is Verdict.OK
    assert judge(4 * GIB, GIB, vectors="disk").verdict is Verdict.OK


def test_a_slow_disk_is_told_what_waits_for_it() -> None:
    seen = replace(DISK, write_bytes_per_s=2e6)
    expect(judge_disk(seen, CONFIG, None), Check.DISK, Verdict.WARNING, "only 2.0 MB/s", "a faster disk")
    expect(
        judge_disk(replace(DISK, write_bytes_per_s=None), CONFIG, None),
        Check.DISK,
        Verdict.NOT_CHECKED,
        "in time",
        AGAIN,
    )


# -- GPU and torch ---------------------------------------------------------------------------------------------------

NO_TORCH = TorchSeen(version="")
CPU_BUILD = TorchSeen(version="2.9.0+cpu", driver="570.1")


@pytest.mark.parametrize(
    ("seen", "device", "verdict", "text", "step"),
    [
        (NO_TORCH, "auto", Verdict.PROBLEM, "torch is not installed", "pip install 'shoal[train]'"),
        (
            TorchSeen(version="", fault="libcudart.so.12: cannot open"),
            "auto",
            Verdict.PROBLEM,
            "libcudart",
            "reinstall",
        ),
        (Unknown(why="took too long", next_step="look"), "auto", Verdict.NOT_CHECKED, "took too long", "look"),
        (TORCH, "auto", Verdict.OK, "torch 2.9.0 uses H200, 107 GB of 150 GB free", ""),
        (TORCH, "cuda", Verdict.OK, "uses H200", ""),
        (TORCH, "cpu", Verdict.OK, "H200 stays idle", ""),
        (TorchSeen(version="2.9.0+cpu"), "auto", Verdict.OK, "trains on the CPU", ""),
        (TorchSeen(version="2.9.0+cpu"), "cpu", Verdict.OK, "trains on the CPU", ""),
        (TorchSeen(version="2.9.0+cpu"), "cuda", Verdict.PROBLEM, "trainer.device is cuda", "--device cpu"),
        (CPU_BUILD, "auto", Verdict.WARNING, "built without CUDA", "--index-url https://download.pytorch.org"),
        (CPU_BUILD, "cuda", Verdict.PROBLEM, "built without CUDA", "--index-url https://download.pytorch.org"),
        (CPU_BUILD, "cpu", Verdict.OK, "trains on the CPU", ""),
        (
            TorchSeen(version="2.9", cuda_built=True, cuda_fault="driver too old", driver="390"),
            "auto",
            Verdict.WARNING,
            "driver too old; it would train on the CPU",
            "nvidia-smi",
        ),
    ],
)
def test_torch(seen: TorchSeen | Unknown, device: str, verdict: Verdict, text: str, step: str) -> None:
    expect(judge_torch(seen, device_config(device), None), Check.TRAINER, verdict, text, step)


def test_a_gpu_too_small_for_the_model() -> None:
    full = replace(TORCH, devices=(replace(GPU, free_bytes=1_599_999_999),))
    expect(judge_torch(full, CONFIG, MODEL), Check.TRAINER, Verdict.PROBLEM, "takes 1.6 GB", "nvidia-smi")
    two = replace(full, devices=(*full.devices, replace(GPU, free_bytes=1_600_000_000)))
    assert judge_torch(two, CONFIG, MODEL).verdict is Verdict.OK


def test_who_trains_nothing_needs_no_torch() -> None:
    bootstrap = NodeConfig(node=NodeTable(role="bootstrap"))
    expect(judge_torch(NO_TORCH, bootstrap, None), Check.TRAINER, Verdict.OK, "not needed")


def test_a_swarm_of_scripts_needs_no_torch_in_the_daemons_python() -> None:
    expect(
        judge_torch(NO_TORCH, CONFIG, replace(MODEL, attached=True)), Check.TRAINER, Verdict.OK, "m is trained by scr"
    )


# -- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "verdict", "text", "step"),
    [
        ({}, Verdict.OK, "python 3.11.7, shoal 0.2.0, libp2p 0.8.1, protocol 1", ""),
        ({"agents": ("shoal/0.2.0 a", "shoal/0.1.0")}, Verdict.OK, "2 peers speak the same protocol", ""),
        ({"libp2p": "0.9.0"}, Verdict.PROBLEM, "made for libp2p 0.8.1", "pip install 'libp2p==0.8.1'"),
        ({"agents": ("shoal/0.3.0", "shoal/0.2.0", "shoal/0.3.1")}, Verdict.WARNING, "up to 0.3.1", "--upgrade shoal"),
        ({"agents": ("shoal/0.3.0", "shoal/0.2.0")}, Verdict.OK, "same protocol", ""),
        ({"refusing": ("abc",)}, Verdict.PROBLEM, "abc speak another version", "--upgrade shoal"),
        ({"refusing": ("abc",), "agents": ("shoal/0.2.0",) * 3}, Verdict.WARNING, "1 peer speak", "abc to update"),
        ({"agents": ("other/9.0", "shoal/x", "\x1b[31m")}, Verdict.OK, "3 peers", ""),
    ],
)
def test_versions(changes: dict[str, str], verdict: Verdict, text: str, step: str) -> None:
    expect(judge_versions(replace(VERSIONS, **changes)), Check.VERSIONS, verdict, text, step)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.1.0", (0, 1, 0)), ("1.2rc1", (1, 2)), ("2", (2,)), ("x", None), ("", None), ("9" * 5000, None)],
)
def test_version_numbers(text: str, version: tuple[int, ...] | None) -> None:
    assert parse_version(text) == version


def test_agents() -> None:
    assert parse_agent("shoal/0.1.0 otter") == (0, 1, 0)
    assert parse_agent("js-libp2p/1.0") is None
