"""Swarms that train something else than bytes: images, the user's own code where the volunteer allows it, and language
models of transformers on tokens."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from shoal.node.status import HeldOut
from tests.e2e.swarm import Peer, Swarm, replace_task, run
from tests.unit.training.lm_samples import END, GPT2, LLAMA, write_parquet, write_tokenizer, write_weights
from tests.unit.training.user_tasks import EXAMPLE, SINE, importable, write_module

ALLOW = ("--allow-task", SINE)


@contextmanager
def open_swarm(folder: Path, task: str, allow: tuple[str, ...] = ()) -> Iterator[tuple[Swarm, Peer, Peer]]:
    """Two founders that have certified three rounds of this task."""
    swarm = Swarm(folder, founders=2, draft=replace_task(task), create_options=allow)
    try:
        first = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest), *allow)
        second = swarm.add("peer2")
        second.start("join", uri_of(first), *allow)
        swarm.wait("three rounds", lambda: min(first.round, second.round) >= 3)
        yield swarm, first, second
        swarm.check_roots()
        assert "Traceback" not in first.log() + second.log()
    finally:
        swarm.end()


def uri_of(peer: Peer) -> str:
    return peer.ask().uri


def error_of(peer: Peer) -> str:
    return peer.ask().training.error


def held_out_of(peer: Peer) -> HeldOut | None:
    return peer.ask().training.held_out


def has_learned(peer: Peer) -> bool:
    """The digits, as far as it has measured that."""
    measured = held_out_of(peer)
    return measured is not None and measured.loss is not None and measured.loss < 2.0


def loss_of(peer: Peer) -> float:
    loss = peer.ask().training.loss_last
    return math.inf if loss is None else loss


def test_a_swarm_trains_a_classifier_of_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the images are part of scikit-learn")
    with open_swarm(tmp_path, 'kind = "digits"\nwidth = 16') as (swarm, first, second):
        both = (first, second)
        swarm.wait("the base of every fourth round is measured, and has learned", lambda: any(map(has_learned, both)))
        assert all(one is None or one.round % 4 == 0 for one in map(held_out_of, both))
        swarm.wait("both have learned", lambda: all(loss_of(peer) < 2.0 for peer in both))  # of guessing it is ln 10


def test_the_users_own_task_is_trained_by_those_who_allow_it(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    write_module(modules, "sine_task", EXAMPLE)
    task = f'kind = "custom"\npath = "{SINE}"\nwidth = 16'
    with importable(modules), open_swarm(tmp_path, task, ALLOW) as (swarm, first, second):
        third = swarm.add("peer3").start("join", uri_of(first))
        line = f'allow_tasks = ["{SINE}"]'
        swarm.wait("the status of who does not allow it names the line to add", lambda: line in error_of(third))
        assert line in third.log()
        shown = run("status", "--data-dir", str(third.folder)).stdout
        assert f"trainer.allow_tasks: does not allow {SINE}. Fix: " in shown and line in shown
        at = first.head
        swarm.wait("the others go on", lambda: min(first.round, second.round) > at)
        assert third.leave() == 0
        third.start("join", uri_of(first), *ALLOW)
        at = first.head
        swarm.wait("now it contributes", lambda: third.contributes_after(at))


def test_a_swarm_trains_a_causal_language_model_on_tokens(tmp_path: Path) -> None:
    """One peer has its text as Parquet, the other as shards; a third one has another tokenizer."""
    transformers = pytest.importorskip("transformers", reason="an extra")
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    texts = [file.read_text() for file in sorted(Path(json.__file__).parent.glob("*.py"))]
    parquet = write_parquet(tmp_path / "texts.parquet", {"text": texts * 4})
    shards = tmp_path / "shards"
    made = run("tokenize", str(parquet), "--tokenizer", str(tokenizer), "--out", str(shards), "--end", END)
    assert made.returncode == 0, made.stderr
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "tie_word_embeddings": True}))
    task = f'kind = "causal_lm"\ncontext = 32\nconfig = "{tmp_path}/config.json"\ntokenizer = "{tokenizer}"'
    swarm = Swarm(tmp_path, founders=2, draft=replace_task(task))
    try:
        first, second, third = (swarm.add(f"peer{number}") for number in (1, 2, 3))
        other = write_tokenizer(tmp_path / "other.json", ["t h"])
        for peer, text, file in ((first, parquet, tokenizer), (second, shards, tokenizer), (third, parquet, other)):
            peer.options += ["--text", str(text), "--tokenizer", str(file)]
        first.start("up", "--manifest", str(swarm.manifest))
        second.start("join", uri_of(first))
        swarm.wait("two rounds", lambda: min(first.round, second.round) >= 2)
        third.start("join", uri_of(first))
        digest = f"blake3:{blake3(tokenizer.read_bytes()).hexdigest()}"
        swarm.wait("the status tells which tokenizer is wanted", lambda: digest in error_of(third))
        for peer in (first, second):
            swarm.wait("its work is in a round", lambda: peer.contributes_after(0))  # noqa: B023
        for peer in (first, second):
            assert peer.leave() == 0
        swarm.check_roots()
        assert "Traceback" not in first.log() + second.log() + third.log()
        out = tmp_path / "out"
        words = ("--out", str(out), "--format", "hf", "--tokenizer", str(tokenizer))
        exported = run("export", "--data-dir", str(first.folder), *words)
        assert exported.returncode == 0, exported.stderr
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        ids = transformers.AutoTokenizer.from_pretrained(out)("import json", return_tensors="pt")["input_ids"]
        assert model(ids, labels=ids).loss.item() < 6.0, "that of guessing is ln 300 = 5.7"
    finally:
        swarm.end()


@pytest.mark.long
def test_a_swarm_trains_adapters_on_weights_that_each_member_has(tmp_path: Path) -> None:
    """The draft names the folder alone; a third peer has other weights."""
    torch, transformers = (pytest.importorskip(name, reason="an extra") for name in ("torch", "transformers"))
    weights, other = tmp_path / "weights", tmp_path / "other"
    digest = write_weights(weights, GPT2)
    write_weights(other, {**GPT2, "n_layer": 1})
    task = f'kind = "causal_lm"\ncontext = 32\nweights = "{weights}"\nlora_rank = 4'
    swarm = Swarm(tmp_path, founders=2, draft=replace_task(task))
    try:
        first, second, third = (swarm.add(f"peer{number}") for number in (1, 2, 3))
        for peer, folder in ((first, weights), (second, weights), (third, other)):
            peer.options += ["--weights", str(folder)]
        first.start("up", "--manifest", str(swarm.manifest))
        second.start("join", uri_of(first))
        swarm.wait("three rounds", lambda: min(first.round, second.round) >= 3)
        third.start("join", uri_of(first))
        swarm.wait("the status tells which weights are wanted", lambda: digest in error_of(third))
        for peer in (first, second):
            swarm.wait("its work is in a round", lambda: peer.contributes_after(0))  # noqa: B023
        for peer in (first, second):
            assert peer.leave() == 0
        swarm.check_roots()
        assert "Traceback" not in first.log() + second.log() + third.log()
        for name, words in (("merged", ("hf", "--weights", str(weights))), ("adapter", ("peft",))):
            out = ("--data-dir", str(first.folder), "--out", str(tmp_path / name))
            exported = run("export", *out, "--format", *words)
            assert exported.returncode == 0, exported.stderr
        refused = run("export", "--data-dir", str(first.folder), "--out", str(tmp_path / "no"), "--format", "hf")
        assert refused.returncode != 0 and digest in refused.stderr
    finally:
        swarm.end()
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (weights, tmp_path / "merged")]
    ids = torch.tensor([list(Path(json.__file__).read_bytes()[:512])]).view(16, 32)
    before, after = (model.eval()(ids, labels=ids).loss.item() for model in models)
    assert after < before - 0.1, "it has learned"
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 16 and all(one.any() for one in adapter.values())


@pytest.mark.long
def test_a_swarm_trains_on_a_streamed_data_set_and_a_restart_goes_on_in_it(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="an extra")
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        rows = (f"def add_{number}_{row}(first, second):\n    return first + second\n" * 4 for row in range(2000))
        (data / f"{number}.jsonl").write_text("".join(json.dumps({"code": text}) + "\n" for text in rows))
    config = tmp_path / "config.toml"
    config.write_text(f'[trainer]\ndataset = "{data}"\ndataset_column = "code"\n')
    swarm = Swarm(tmp_path, founders=2)
    swarm.text = None
    try:
        first, second = swarm.add("peer1"), swarm.add("peer2")
        first.start("up", "--manifest", str(swarm.manifest), "--config", str(config))
        second.start("join", uri_of(first), "--config", str(config))
        swarm.wait("three rounds", lambda: min(first.round, second.round) >= 3)
        second.kill()
        at = first.head
        second.start("up", "--config", str(config))
        swarm.wait("it contributes again", lambda: second.contributes_after(at))
        assert (second.folder / "trainer" / "stream.json").exists()
        swarm.wait("it learns", lambda: loss_of(second) < 4.0)
        for peer in (first, second):
            assert "may come again" not in peer.log() and "Traceback" not in peer.log()
        swarm.check_roots()
    finally:
        swarm.end()


@pytest.mark.long
def test_a_data_set_with_another_column_is_told_in_the_status(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="an extra")
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"content": "some text"}) + "\n")
    swarm = Swarm(tmp_path, founders=1)
    swarm.text = None
    try:
        peer = swarm.add("peer1").start("up", "--manifest", str(swarm.manifest), "--dataset", str(data))
        swarm.wait("its status says what to do", lambda: "trainer.dataset_column" in error_of(peer))
        assert "the columns: content" in error_of(peer)
    finally:
        swarm.end()
