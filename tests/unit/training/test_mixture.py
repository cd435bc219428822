"""Exports measured on a text: alone as the task's own loss has it, together by the posterior of what came before."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

from shoal.node.evaluate import add_evaluate_arguments, run_evaluate
from shoal.node.export import CertifiedModel, write_model
from shoal.node.training.causal_lm import CausalLm
from shoal.node.training.mixture import EXPERTS_MAX, Expert, Mixture, describe, encode_json, open_expert, read_windows
from shoal.node.training.tasks import WritesText, make_task
from shoal.node.training.tasks import describe as describe_task
from shoal.protocol.errors import ConfigError
from shoal.protocol.layout import initialise
from shoal.protocol.manifest import Task, make_manifest, parse_draft
from tests.unit.protocol.samples import PEERS
from tests.unit.training.lm_samples import GPT2, make_lm_task, write_tokenizer, write_weights
from tests.unit.training.tiny import OPTIONS, TASK, TEXT

torch.set_num_threads(1)
OTHER = Task(kind="byte_gpt", options=json.dumps(OPTIONS | {"width": 48, "layers": 2, "context": 40}))


def export(path: Path, task: Task = TASK, seed: int = 1) -> Path:
    """As `shoal export` writes it; the values are a seed's and some noise, so that no two bytes are as likely."""
    layout = describe_task(task)
    draft = parse_draft(f'name = "x"\n[task]\nkind = "{task.kind}"', task.options)
    manifest = make_manifest(draft, layout, PEERS[0], PEERS[:1])
    params = initialise(layout, seed)
    params += np.random.default_rng(seed).normal(0, 0.3, params.size).astype(np.float32)
    write_model(CertifiedModel(manifest=manifest, round=3, state_root=bytes(32), params=params), path)
    return path


def likelihoods(task: Task, path: Path, windows: np.ndarray[Any, Any]) -> torch.Tensor:
    """Of what came, by the model that a plain loader makes of the file: (N, T)."""
    model = make_task(task).build_model()
    tensors = load_file(path)
    model.load_state_dict({name: torch.from_numpy(tensors[name]) for name, _ in model.named_parameters()})
    with torch.no_grad():
        odds = F.softmax(model(torch.from_numpy(windows[:, :-1])), dim=-1)
    return odds.gather(2, torch.from_numpy(windows[:, 1:, None]))[..., 0].double()


def test_models_of_two_sizes_are_measured_alone_and_by_their_posterior(tmp_path: Path) -> None:
    paths = [export(tmp_path / "a.safetensors"), export(tmp_path / "b.safetensors", OTHER, 2)]
    mixture = Mixture(paths)
    assert mixture.context == 32, "what the smaller one can take"
    windows = read_windows(Path(TEXT), mixture.tokenizer, mixture.context, 20)
    assert windows.shape == (20, 33)
    told: list[str] = []
    measured = mixture.measure(windows, told.append)
    first, second = likelihoods(TASK, paths[0], windows), likelihoods(OTHER, paths[1], windows)
    assert measured.alone == pytest.approx([-first.log().mean().item(), -second.log().mean().item()], rel=1e-5)
    total, share = 0.0, 0.0
    for row in range(20):
        one = two = 0.5
        for place in range(32):
            p, q = first[row, place].item(), second[row, place].item()
            total -= np.log((one * p + two * q) / (one + two))
            share += one / (one + two)
            one, two = one * p / (one * p + two * q), two * q / (one * p + two * q)
    assert measured.together == pytest.approx(total / 640, rel=1e-4) and measured.tokens == 640
    assert measured.shares == pytest.approx([share / 640, 1 - share / 640], rel=1e-3)
    assert told == ["0 of 20 windows", "16 of 20 windows"]


@pytest.mark.parametrize("task", [TASK, make_lm_task(GPT2)], ids=["byte_gpt", "gpt2"])
def test_one_model_writes_what_its_task_writes(tmp_path: Path, task: Task) -> None:
    mixture = Mixture([export(tmp_path / "a.safetensors", task)])
    (one,) = mixture.experts
    assert isinstance(one.task, WritesText)
    assert mixture.sample("def ", 60) == one.task.sample(one.model, b"def ", 60)


def test_copies_write_what_one_writes_and_weigh_the_same(tmp_path: Path) -> None:
    path = export(tmp_path / "a.safetensors")
    mixture = Mixture([path, path])
    assert mixture.sample("x", 60) == Mixture([path]).sample("x", 60)
    measured = mixture.measure(read_windows(Path(TEXT), mixture.tokenizer, 32, 4), lambda text: None)
    assert measured.shares == pytest.approx([0.5, 0.5]) and measured.together == pytest.approx(measured.alone[0])


def test_models_of_a_tokenizer_are_measured_in_its_tokens(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    from shoal.node.training.tokenizer import FileTokenizer, write_digest

    task = make_lm_task(GPT2, tokenizer=write_digest(FileTokenizer(tokenizer).digest))
    path = export(tmp_path / "a.safetensors", task)
    mixture = Mixture([path], tokenizer)
    windows = read_windows(Path(TEXT), mixture.tokenizer, mixture.context, 3)
    assert windows.max() > 255
    with pytest.raises(ConfigError, match=r"tokenizer.* is missing"):
        Mixture([path])
    with pytest.raises(ConfigError, match=r"bytes\.safetensors and .*a\.safetensors do not predict the same tokens"):
        Mixture([path, export(tmp_path / "bytes.safetensors")], tokenizer)


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {}], ids=["adapters", "the whole model"])
def test_what_was_trained_on_trained_weights_is_measured_on_them(tmp_path: Path, options: dict[str, int]) -> None:
    weights = tmp_path / "weights"
    digest = write_weights(weights, GPT2)
    task = make_lm_task(GPT2, weights=digest, **options)
    path = export(tmp_path / "a.safetensors", task)
    with pytest.raises(ConfigError, match=digest):
        Mixture([path])
    mixture = Mixture([path], weights=weights)
    windows = read_windows(Path(TEXT), mixture.tokenizer, mixture.context, 2)
    (loss,) = mixture.measure(windows, lambda text: None).alone
    (one,) = mixture.experts
    with torch.no_grad():
        assert loss == pytest.approx(make_loss(one, windows), rel=1e-5)
        for parameter in one.model.parameters():
            parameter.zero_()
    from transformers import AutoModelForCausalLM

    start = AutoModelForCausalLM.from_pretrained(weights).eval()
    with torch.no_grad():
        logits = start(input_ids=torch.from_numpy(windows[:, :-1])).logits
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(windows[:, 1:]).flatten()).item()
    assert mixture.measure(windows, lambda text: None).alone == pytest.approx((expected,), rel=1e-4), "the start"
    assert abs(loss - expected) > 0.01


def make_loss(one: Expert, windows: np.ndarray[Any, Any]) -> float:
    """As the trainer has it."""
    assert isinstance(one.task, CausalLm)
    return one.task.loss(one.model, torch.from_numpy(windows)).item()


def test_the_whole_of_a_short_text_is_read(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(200, 233)))  # no UTF-8
    tokenizer = Mixture([export(tmp_path / "a.safetensors")]).tokenizer
    assert read_windows(text, tokenizer, 32, 100).tolist() == [list(range(200, 233))] * 2
    text.write_bytes(bytes(32))
    with pytest.raises(ConfigError, match=r"--text: .* has 32 tokens"):
        read_windows(text, tokenizer, 32, 100)
    with pytest.raises(ConfigError, match=r"--text: .* cannot be read: No such file"):
        read_windows(tmp_path / "none", tokenizer, 32, 100)


def test_what_is_no_export_of_a_language_model_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"MODEL: .*x\.safetensors is not there\. Fix: name a file that `shoal expo"):
        open_expert(path)
    path.write_bytes(b"\x80\x04pickled")
    with pytest.raises(ConfigError, match=r"x\.safetensors cannot be read"):
        open_expert(path)
    whole = load_file(export(tmp_path / "whole.safetensors"))
    name = next(iter(whole))
    about = {"task": TASK.kind, "task_options": TASK.options}
    refusals: list[tuple[dict[str, np.ndarray[Any, Any]], dict[str, str] | None, str]] = [
        (whole, None, "does not say what task"),
        (whole, about | {"task": "nothing"}, "task.kind"),
        (whole, about | {"task": "digits", "task_options": "{}"}, "digits predicts no tokens"),
        (whole, about | {"task": "custom", "task_options": '{"path": "os:system"}'}, "os:system"),
        (whole, about | {"task_options": "["}, "is not JSON"),
        ({key: value for key, value in whole.items() if key != name}, about, f"{name} is missing"),
        (whole | {name: whole[name][:1]}, about, f"{name} has the shape"),
    ]
    for tensors, metadata, problem in refusals:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ConfigError, match=problem):
            open_expert(path)
    with pytest.raises(ConfigError, match=f"name 1 to {EXPERTS_MAX}"):
        Mixture([path] * (EXPERTS_MAX + 1))


def test_the_command_tells_a_table_or_json_and_what_they_write(tmp_path: Path) -> None:
    parser = ArgumentParser()
    add_evaluate_arguments(parser)
    paths = [str(export(tmp_path / "a.safetensors")), str(export(tmp_path / "b.safetensors", OTHER))]
    told: list[Any] = []

    def run(*arguments: str) -> str:
        told.clear()
        assert run_evaluate(parser.parse_args([*paths, *arguments]), told.append) == 0
        return str(told[0])

    table = run("--text", TEXT, "--windows", "2").splitlines()
    assert len(table) == 4 and table[1].startswith(paths[0]) and table[3].startswith("together")
    found = json.loads(run("--text", TEXT, "--windows", "2", "--json"))
    assert [one["model"] for one in found["models"]] == paths and found["tokens"] == 64
    assert f"{found['together_nats']:.4f}" in table[3]
    assert len(run("--sample", "x")) > 0
    for bad, field in ((("--text", TEXT, "--windows", "0"), "--windows"), ((), "--text: is missing")):
        with pytest.raises(ConfigError, match=field):
            run(*bad)


def test_a_single_model_has_no_line_for_all(tmp_path: Path) -> None:
    mixture = Mixture([export(tmp_path / "a.safetensors")])
    measured = mixture.measure(read_windows(Path(TEXT), mixture.tokenizer, 32, 2), lambda text: None)
    assert len(describe(mixture, measured)) == 2 and json.loads(encode_json(mixture, measured))["tokens"] == 64
