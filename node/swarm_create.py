"""`shoal swarm create`: from the draft that a person writes to the signed manifest of a swarm, and its owner's key.

Invariant: nothing is written before the draft, the task's files and the layout were found to fit.
"""

import argparse
import asyncio
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.dht.addresses import parse_peer_address
from shoal.node.identity_file import load_or_create_identity
from shoal.node.output_files import replacing
from shoal.node.trainer import describe_task
from shoal.node.training.causal_lm_config import CAUSAL_LM, fill_in, find_tokenizer, find_weights
from shoal.node.training.custom_task import ATTACHED, CUSTOM
from shoal.node.training.tokenizer import BYTES
from shoal.protocol.errors import ConfigError, ManifestError, UriError
from shoal.protocol.identity import format_peer_id, parse_peer_id
from shoal.protocol.manifest import (
    DELAYED,
    EAGER,
    SwarmUri,
    check_draft,
    make_manifest,
    parse_draft,
    read_manifest_untrusted,
    sign_manifest,
    size_parts,
    task_kind,
    task_options,
)

ADMISSION_TOLD = {
    "open": "open: whoever has the URI may take part",
    "listed": "listed: let others in with `shoal swarm admit PEER_ID`",
    "invited": "invited: let others in with `shoal swarm invite`, or `shoal swarm admit PEER_ID`",
}


def create_swarm(
    options: argparse.Namespace, folder: Path, told: Callable[[str], object], noticed: Callable[[str], object]
) -> int:
    """`folder` is the data folder of the first voter; `told` gets the result, `noticed` what is waited for. Raises
    InputError for what a person must mend."""
    try:
        text = options.draft.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(options.draft), f"cannot be read: {error}", "give the path of a draft") from error
    filled = fill_in(task_kind(text), task_options(text), options.draft.parent)
    task = json.dumps(filled, sort_keys=True, separators=(",", ":"))
    draft = parse_draft(text, task)
    check_draft(draft)  # before torch is waited for
    if draft.task.kind == ATTACHED and draft.training.strategy == EAGER:
        fix = f'use strategy = "{DELAYED}"'
        raise ManifestError("training.strategy", "is eager, which a script of one's own does not do", fix)
    bootstraps = tuple(map(_check_bootstrap, options.bootstrap))
    founders = tuple(parse_peer_id(text) for text in options.founder)
    weights = find_weights(draft.task.kind, task_options(text), options.draft.parent)
    noticed("a process with torch builds it once")
    layout = asyncio.run(describe_task(draft.task, options.allow_task, weights))
    draft = size_parts(draft, text, layout.elements)
    owner = load_or_create_identity(folder / "owner.key")
    peer = load_or_create_identity(folder / "identity.key")
    voters = tuple(dict.fromkeys((peer.peer, *founders)))
    signed = sign_manifest(make_manifest(draft, layout, owner.peer, voters), owner)
    _, swarm = read_manifest_untrusted(signed)
    out = options.out or options.draft.with_suffix(".shoal")
    with replacing("--out", out) as temporary:
        temporary.write_bytes(signed)
    told(f"swarm      {draft.name}: {layout.elements:,} parameters, first voter {format_peer_id(peer.peer)}")
    told(f"manifest   {out}")
    if draft.task.kind == CAUSAL_LM and filled.get("tokenizer", BYTES) != BYTES:
        told(f"tokenizer  {filled['tokenizer']} (its members start with --tokenizer FILE: send them that file)")
    if draft.task.kind == CAUSAL_LM and "weights" in filled:
        told(f"weights    {filled['weights']} (its members start with --weights FOLDER: send them that folder)")
    told(f"owner key  {folder / 'owner.key'} (keep it safe: it signs changes of the swarm)")
    told(f"URI        {SwarmUri(swarm=swarm, bootstraps=bootstraps)}")
    told(f"admission  {ADMISSION_TOLD[draft.admission.rule]}")
    needed = describe_needs(draft.task.kind, task_options(text), options.draft.parent)
    told(f"start it   {shlex.join(('shoal', 'up', '--manifest', str(out), '--data-dir', str(folder), *needed))}")
    return 0


def describe_needs(kind: str, options: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The flags without which the trainer of such a task ends; `options` are the draft's, which is in `folder`."""
    if kind == CUSTOM:
        return ("--allow-task", str(options.get("path")))
    if kind != CAUSAL_LM:
        return ()
    weights, tokenizer = find_weights(kind, options, folder), find_tokenizer(options, folder)
    needed = ("--weights", str(weights or "FOLDER")) if "weights" in options else ()
    return needed if options.get("tokenizer", BYTES) == BYTES else (*needed, "--tokenizer", str(tokenizer or "FILE"))


def _check_bootstrap(text: str) -> str:
    try:
        parse_peer_address(text)
    except UriError as error:
        raise ConfigError("--bootstrap", error.problem, error.fix) from error
    return text
