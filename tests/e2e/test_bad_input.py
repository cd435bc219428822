"""What a person gets wrong is refused with a message that names the field and the fix, before anything is started."""

import socket
from pathlib import Path

import pytest

from tests.e2e.swarm import Swarm, run


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("join", "http://x"), "shoal://"),
        (("join", "shoal://12"), "URI: swarm id"),
        (("join", "shoal://" + "ab" * 32 + "?bootstrap=1.2.3.4:5"), "bootstrap"),
        (("up",), "shoal swarm create"),
        (("up", "--manifest", "/nonexistent.shoal"), "/nonexistent.shoal"),
        (("status", "--web-port", "1"), "shoal up"),
        (("export", "--out", "x", "--data-dir", "/nonexistent"), "/nonexistent"),
        (("export", "--out", "x", "--tokenizer", "t.json"), "--format hf"),
        (("evaluate", "/nonexistent", "--text", __file__), "/nonexistent"),
        (("tokenize", __file__, "--out", "/nonexistent/x", "--shard-tokens", "0"), "--shard-tokens"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    folder = () if arguments[0] in ("status", "export", "evaluate", "tokenize") else ("--data-dir", str(tmp_path))
    done = run(*arguments, *folder)
    assert done.returncode == 1
    assert wanted in done.stderr and "Fix:" in done.stderr and "Traceback" not in done.stderr


def test_bad_draft_names_field_and_line(tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    draft.write_text('name = "x"\n[task]\nkind = "byte_gpt"\n[rounds]\ncodec = "zip"\n')
    done = run("swarm", "create", str(draft), "--data-dir", str(tmp_path))
    assert done.returncode == 1 and "rounds.codec (line 5)" in done.stderr and "int8" in done.stderr


def test_a_swarm_is_made_with_addresses_that_can_be_dialled_and_where_it_can_be_written(tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    draft.write_text('name = "x"\n[task]\nkind = "byte_gpt"\nlayers = 1\nheads = 2\nwidth = 8\ncontext = 8\n')
    create = ("swarm", "create", str(draft), "--data-dir", str(tmp_path / "peer"))
    done = run(*create, "--bootstrap", "127.0.0.1:9460")
    assert done.returncode == 1 and "--bootstrap" in done.stderr and "Fix: write it like /ip4/" in done.stderr
    done = run(*create, "--out", str(tmp_path))
    assert done.returncode == 1 and f"--out: {tmp_path} cannot be written" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.partial"))


def test_eager_is_not_for_a_script_of_ones_own(tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    training = '[training]\nstrategy = "eager"\noverlap_steps = 5\n'
    draft.write_text(f'name = "x"\n[task]\nkind = "attached"\npath = "a.b:build"\n{training}')
    done = run("swarm", "create", str(draft), "--data-dir", str(tmp_path))
    assert done.returncode == 1 and "training.strategy" in done.stderr and 'strategy = "delayed"' in done.stderr


def test_code_is_run_for_a_manifest_only_where_it_is_allowed(tmp_path: Path) -> None:
    draft = tmp_path / "draft.toml"
    draft.write_text('name = "x"\n[task]\nkind = "custom"\npath = "json.decoder:JSONDecoder"\n')
    create = ("swarm", "create", str(draft), "--data-dir", str(tmp_path))
    done = run(*create)
    assert done.returncode == 1 and "trainer.allow_tasks" in done.stderr
    assert "--allow-task json.decoder:JSONDecoder" in done.stderr
    done = run(*create, "--allow-task", "json.decoder:JSONDecoder")
    assert done.returncode == 1 and "task.path" in done.stderr and "has no layout" in done.stderr


def test_damaged_manifest_is_refused(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, founders=1)
    raw = bytearray(swarm.manifest.read_bytes())
    raw[len(raw) // 2] ^= 1
    swarm.manifest.write_bytes(raw)
    done = run("up", "--manifest", str(swarm.manifest), "--data-dir", str(tmp_path / "peer1"))
    assert done.returncode == 1 and "swarm.shoal" in done.stderr


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, founders=1)
    (tmp_path / "peer1" / "identity.key").chmod(0o644)
    done = run("up", "--manifest", str(swarm.manifest), "--data-dir", str(tmp_path / "peer1"))
    assert done.returncode == 1 and "chmod 600" in done.stderr


@pytest.mark.parametrize("flag", ["--control-port", "--tensor-port", "--web-port"])
def test_port_taken_is_one_clear_line(flag: str, tmp_path: Path) -> None:
    swarm = Swarm(tmp_path, founders=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"--control-port": "0", "--tensor-port": "0", "--web-port": "0"}
        ports[flag] = str(taken.getsockname()[1])
        given = [word for pair in ports.items() for word in pair]
        hosts = ["--control-host", "127.0.0.1", "--tensor-host", "127.0.0.1"]
        done = run("up", "--manifest", str(swarm.manifest), "--data-dir", str(tmp_path / "peer1"), *given, *hosts)
    assert done.returncode == 1
    assert ports[flag] in done.stderr and "Traceback" not in done.stderr
    assert flag.removeprefix("--").replace("-", ".") in done.stderr
