"""`shoal swarm create`: from the draft that a person writes to the signed manifest of a swarm, and its owner's key.

Invariant: nothing is written before the draft, the task's files and the layout were found to fit.
"""

import argparse
import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from shoal.node.identity_file import load_or_create_identity
from shoal.node.trainer import describe_task
from shoal.node.training.causal_lm_config import CAUSAL_LM, fill_in, find_weights
from shoal.node.training.custom_task import ATTACHED
from shoal.node.training.tokenizer import BYTES
from shoal.protocol.errors import ConfigError, ManifestError
from shoal.protocol.identity import format_peer_id, parse_peer_id
from shoal.protocol.manifest import (
    DELAYED,
    EAGER,
    SwarmUri,
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


def create_swarm(options: argparse.Namespace, folder: Path, told: Callable[[str], object]) -> int:
    """`folder` is the data folder of the first voter. Raises InputError for what a person must mend."""
    try:
        text = options.draft.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(options.draft), f"cannot be read: {error}", "give the path of a draft") from error
    filled = fill_in(task_kind(text), task_options(text), options.draft.parent)
    task = json.dumps(filled, sort_keys=True, separators=(",", ":"))
    draft = parse_draft(text, task)
    if draft.task.kind == ATTACHED and draft.training.strategy == EAGER:
        fix = f'use strategy = "{DELAYED}"'
        raise ManifestError("training.strategy", "is eager, which a script of one's own does not do", fix)
    weights = find_weights(draft.task.kind, task_options(text), options.draft.parent)
    layout = asyncio.run(describe_task(draft.task, options.allow_task, weights))
    draft = size_parts(draft, text, layout.elements)
    owner = load_or_create_identity(folder / "owner.key")
    peer = load_or_create_identity(folder / "identity.key")
    founders = tuple(dict.fromkeys((peer.peer, *(parse_peer_id(text) for text in options.founder))))
    signed = sign_manifest(make_manifest(draft, layout, owner.peer, founders), owner)
    _, swarm = read_manifest_untrusted(signed)
    out = options.out or options.draft.with_suffix(".shoal")
    out.write_bytes(signed)
    told(f"swarm      {draft.name}: {layout.elements:,} parameters, first voter {format_peer_id(peer.peer)}")
    told(f"manifest   {out}")
    if draft.task.kind == CAUSAL_LM and filled.get("tokenizer", BYTES) != BYTES:
        told(f"tokenizer  {filled['tokenizer']} (its members start with --tokenizer FILE: send them that file)")
    if draft.task.kind == CAUSAL_LM and "weights" in filled:
        told(f"weights    {filled['weights']} (its members start with --weights FOLDER: send them that folder)")
    told(f"owner key  {folder / 'owner.key'} (keep it safe: it signs changes of the swarm)")
    told(f"URI        {SwarmUri(swarm=swarm, bootstraps=tuple(options.bootstrap))}")
    told(f"admission  {ADMISSION_TOLD[draft.admission.rule]}")
    told(f"start it   shoal up --manifest {out} --data-dir {folder}")
    return 0
