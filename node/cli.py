"""The command line: parse, run, print. The only module besides terminal.py that writes to the terminal.

Exit codes: 0 done, 1 a person must mend something (the message says what), 2 no such command or option, 130 interrupted
twice; of `shoal verify` and `shoal ledger verify` 3 where something does not hold, 4 where nothing fails and something
cannot be told.
"""

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.node.process import (
    keep_all_objects,
    leave_with_stdin,
    look_for_garbage_seldom,
    loop_factory,
    set_up_log,
    stop_on_signals,
)
from shoal.protocol.errors import ConfigError, InputError, ShoalError

if TYPE_CHECKING:
    from shoal.crdt.entries import Batch
    from shoal.node.config import NodeConfig
    from shoal.node.decrees import AlreadyDecreed
    from shoal.protocol.identity import Identity, PeerId

EXIT_INPUT = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of `shoal`."""
    if not __debug__:
        print("shoal: run it without -O: its assertions are part of it", file=sys.stderr)
        return EXIT_INPUT
    look_for_garbage_seldom()
    options = _make_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except InputError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return EXIT_INPUT
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _make_parser() -> argparse.ArgumentParser:
    from shoal.node.config import FLAGS
    from shoal.node.ledger_commands import add_ledger_parsers

    parser = argparse.ArgumentParser(prog="shoal", description="Volunteer decentralized training, peer to peer.")
    parser.add_argument("--version", action="version", version=f"shoal {version('shoal')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="run one peer in the foreground")
    join = commands.add_parser("join", help="join a swarm by its shoal:// URI, in the foreground")
    join.add_argument("uri", help="shoal://<swarm-id>?bootstrap=<multiaddr>[&invite=<invitation>]")
    for command in (up, join):
        command.add_argument("--config", type=Path, help="a TOML file; see configs/")
        for flag, field in FLAGS.items():
            if not (command is join and flag == "swarm"):
                command.add_argument(f"--{flag}", metavar="VALUE", help=f"overrides {field}")
        # For a program that starts daemons of its own, as the demo does: they are not to outlive it.
        command.add_argument("--leave-with-stdin", action="store_true", help=argparse.SUPPRESS)
        command.set_defaults(run=_run_up)

    _add_relay_command(commands)

    status = commands.add_parser("status", help="show a running peer")
    status.add_argument("--watch", action="store_true", help="keep it up to date until Ctrl-C")
    status.add_argument("--json", action="store_true", help="one JSON object")
    status.add_argument("--data-dir", type=Path, help="of the running peer; instead of --web-port")
    status.add_argument("--web-host", default="127.0.0.1")
    status.add_argument("--web-port", type=int, default=None)
    status.set_defaults(run=_run_status)

    _add_doctor_command(commands)

    swarm = commands.add_parser("swarm", help="make a swarm").add_subparsers(required=True, metavar="COMMAND")
    create = swarm.add_parser("create", help="make and sign a manifest from a draft, and print the swarm's URI")
    create.add_argument("draft", type=Path, help="a TOML file; see configs/tiny.manifest.toml")
    create.add_argument("--out", type=Path, help="the signed manifest; default: the draft's name with .shoal")
    create.add_argument("--data-dir", type=Path, help="of the peer that founds the swarm; default as for `up`")
    create.add_argument("--founder", action="append", default=[], metavar="PEER_ID", help="further first voters")
    create.add_argument("--bootstrap", action="append", default=[], metavar="MULTIADDR", help="goes into the URI")
    help_allow = "run this code for the model's layout, where the draft names it; as trainer.allow_tasks"
    create.add_argument("--allow-task", action="append", default=[], metavar="MODULE:CLASS", help=help_allow)
    create.set_defaults(run=_run_create)

    reroot = swarm.add_parser(
        "reroot", help="the owner names new voters, when a quorum of the old ones is gone for good"
    )
    reroot.add_argument("--voter", action="append", default=[], metavar="PEER_ID", help="who votes from now on")
    reroot.add_argument("--data-dir", type=Path, help="of a stopped peer that holds the newest round")
    reroot.add_argument("--owner-key", type=Path, help="default: owner.key in the data directory")
    reroot.set_defaults(run=_run_reroot)

    _add_decree_commands(swarm)
    _add_invite_command(swarm)

    identity = commands.add_parser("id", help="print this peer's id, making its key if there is none")
    identity.add_argument("--data-dir", type=Path)
    identity.set_defaults(run=_run_identity)

    _add_model_commands(commands)

    ledger = commands.add_parser("ledger", help="look at a peer's ledger: show, verify, export")
    add_ledger_parsers(ledger)
    ledger.set_defaults(run=_run_ledger)

    _add_trial_commands(commands)
    return parser


def _add_trial_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from shoal.node.bench.commands import add_bench_parsers

    bench = commands.add_parser("bench", help="what this machine can do: rounds, codecs, links, the disk")
    add_bench_parsers(bench)
    bench.set_defaults(run=_run_bench)

    demo = commands.add_parser("demo", help="train with a local swarm, kill a peer, let one join, show the result")
    demo.add_argument("--text", type=Path, help="train on this file or folder; default: Python's own source")
    demo.add_argument("--rounds", type=int, default=None, help="how many rounds to train")
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="where everything goes")
    demo.add_argument("--report", type=Path, help="write the summary as JSON here, too")
    demo.set_defaults(run=_run_demo)


def _add_doctor_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from shoal.node.config import FLAGS

    doctor = commands.add_parser("doctor", help="look for what keeps this machine from taking part, within 15 s")
    doctor.add_argument("uri", nargs="?", help="shoal://… of the swarm; default: that of the data directory")
    doctor.add_argument("--json", action="store_true", help="one JSON object")
    doctor.add_argument("--within", type=float, metavar="SECONDS", help="look for so long at most (default: 15)")
    doctor.add_argument("--config", type=Path, help="as for `up`, and the same options")
    for flag, field in FLAGS.items():
        if flag != "swarm":
            doctor.add_argument(f"--{flag}", metavar="VALUE", help=f"overrides {field}")
    doctor.set_defaults(run=_run_doctor)


RELAY_FLAGS = (
    "data-dir",
    "swarm",
    "bootstrap",
    "control-host",
    "control-port",
    "announce",
    "web-host",
    "web-port",
    "log-level",
    "log-format",
)


def _add_relay_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from shoal.node.config import FLAGS

    relay = commands.add_parser("relay", help="run a bootstrap and relay node: it trains nothing and holds no model")
    relay.add_argument("--config", type=Path, help="a TOML file; see configs/relay.toml")
    for flag in RELAY_FLAGS:
        relay.add_argument(f"--{flag}", metavar="VALUE", help=f"overrides {FLAGS[flag]}")
    relay.set_defaults(run=_run_relay)


def _add_decree_commands(swarm: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, told, run in (
        ("ban", "the owner bans a peer from the ledger: nothing counts of what it writes", _run_ban),
        ("unban", "the owner lifts the bans of a peer", _run_unban),
        ("readmit", "the owner re-admits a peer whose ledger chain has two branches", _run_readmit),
        ("admit", "the owner lets peers into a swarm that is not open", _run_admit),
    ):
        decree = swarm.add_parser(name, help=told)
        decree.add_argument("peer", metavar="PEER_ID", nargs="+" if name == "admit" else None)
        decree.add_argument("--data-dir", type=Path, help="of a stopped peer that has heard of everything")
        decree.add_argument("--owner-key", type=Path, help="default: owner.key in the data directory")
        if name == "ban":
            decree.add_argument("--reason", default="", help="for those who read the ledger")
        if name == "readmit":
            decree.add_argument(
                "--entry", metavar="ID", help="the last entry of the branch that stands; else the longest"
            )
        decree.set_defaults(run=run)


def _add_invite_command(swarm: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from shoal.node.invitations import DAYS_DEFAULT

    invite = swarm.add_parser("invite", help="the owner makes a URI that lets whoever has it into an invited swarm")
    days = f"it lets in for so long; default {DAYS_DEFAULT}"
    invite.add_argument("--days", type=float, default=DAYS_DEFAULT, help=days)
    invite.add_argument("--data-dir", type=Path, help="of a peer of the swarm, running or not")
    invite.add_argument("--owner-key", type=Path, help="default: owner.key in the data directory")
    told = "goes into the URI; default: the addresses of the running peer"
    invite.add_argument("--bootstrap", action="append", default=[], metavar="MULTIADDR", help=told)
    invite.set_defaults(run=_run_invite)


def _add_model_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """What reads a peer's folder and changes nothing."""
    export = commands.add_parser("export", help="write the certified model: safetensors, or a folder for transformers")
    export.add_argument("--out", type=Path, required=True, help="a file; with --format hf or peft a folder")
    export.add_argument("--format", choices=("safetensors", "hf", "peft"), default="safetensors")
    export.add_argument("--round", type=int, help="an older round that this peer retains; default: the newest")
    export.add_argument("--data-dir", type=Path)
    export.add_argument("--tokenizer", type=Path, help="the swarm's tokenizer.json, to go into the folder")
    export.add_argument("--weights", type=Path, help="the folder of the trained weights that the swarm started from")
    export.set_defaults(run=_run_export)

    checkout = commands.add_parser("checkout", help="rebuild a retained round from its snapshot and certified updates")
    checkout.add_argument("--round", type=int, required=True)
    checkout.add_argument("--out", type=Path, help="a folder; default: checkout-ROUND")
    checkout.add_argument("--data-dir", type=Path, help="of a peer that runs or not")
    checkout.set_defaults(run=_run_checkout)

    tokenize = commands.add_parser("tokenize", help="make shards of tokens from text, to train on as trainer.text")
    tokenize.add_argument("text", type=Path, nargs="+", metavar="TEXT", help="a file or folder: text, .jsonl, .parquet")
    tokenize.add_argument("--tokenizer", type=Path, help="the swarm's tokenizer.json; without it a token is a byte")
    tokenize.add_argument("--out", type=Path, required=True, help="a new folder for the shards")
    tokenize.add_argument("--end", metavar="TOKEN", help='comes after every document, such as "<|endoftext|>"')
    tokenize.add_argument("--shard-tokens", type=int, metavar="N", help="a shard ends with so many; default 2^27")
    tokenize.set_defaults(run=_run_tokenize)

    from shoal.node.evaluate import add_evaluate_arguments

    evaluate = commands.add_parser("evaluate", help="measure exported models on a text, each and together, as experts")
    add_evaluate_arguments(evaluate)
    evaluate.set_defaults(run=_run_evaluate)

    verify = commands.add_parser("verify", help="compute certified rounds anew from their parts and say what holds")
    chosen = verify.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--round", type=int, action="append", default=[], help="may be given again")
    chosen.add_argument("--all", action="store_true", help="every round that this peer has a certificate of")
    verify.add_argument("--data-dir", type=Path, help="of a peer that runs or not")
    verify.set_defaults(run=_run_verify)


def _data_dir(given: Path | None) -> Path:
    from shoal.node.config import NodeConfig

    return (given or Path(NodeConfig().node.data_dir)).expanduser().absolute()


def _run_up(options: argparse.Namespace) -> int:
    from shoal.node.config import FLAGS, load_config
    from shoal.node.identity_file import hold_identity, next_incarnation

    given = {flag: getattr(options, flag.replace("-", "_"), None) for flag in FLAGS}
    overrides = {flag: value for flag, value in given.items() if value is not None}
    if options.command == "join":
        overrides["swarm"] = options.uri
    try:
        config = load_config(options.config, overrides)
    except ConfigError as error:
        if options.command == "join" and error.field == "--swarm":
            raise ConfigError("URI", error.problem, error.fix) from error
        raise
    set_up_log(config.log.level, config.log.format)
    folder = config.data_path
    if options.leave_with_stdin:
        leave_with_stdin()
    with hold_identity(folder / "identity.key") as identity:
        incarnation = next_incarnation(folder / "incarnation", time.time())
        return _run_daemon(config, identity, incarnation)


def _run_relay(options: argparse.Namespace) -> int:
    from shoal.node.config import BOOTSTRAP, load_config
    from shoal.node.identity_file import IDENTITY_FILE, hold_identity
    from shoal.node.relay import RelayNode

    given = {flag: getattr(options, flag.replace("-", "_")) for flag in RELAY_FLAGS}
    overrides = {flag: value for flag, value in given.items() if value is not None}
    config = load_config(options.config, {**overrides, "role": BOOTSTRAP})
    set_up_log(config.log.level, config.log.format)

    def tell(ready: RelayNode) -> None:
        print("volunteers put this into control.bootstraps, or into the swarm's URI:")
        for address in ready.addresses():
            print(f"    {address}")
        print(f"metrics and health: http://{config.web.host}:{ready.web_port}/metrics, /healthz, /readyz", flush=True)

    async def serve(identity: "Identity") -> None:
        node = RelayNode(config, identity)
        stop_on_signals(node.stop)
        await node.run(tell)

    held, runner = hold_identity(config.data_path / IDENTITY_FILE), asyncio.Runner(loop_factory=loop_factory())
    with held as identity, runner:
        runner.run(serve(identity))
    return 0


def _run_daemon(config: "NodeConfig", identity: "Identity", incarnation: int) -> int:
    from shoal.node.daemon import Daemon
    from shoal.protocol.identity import format_peer_id

    async def serve() -> None:
        daemon = Daemon(config, identity, incarnation)
        stop_on_signals(daemon.stop)

        def tell(ready: Daemon) -> None:
            keep_all_objects()
            log = logging.getLogger("shoal")
            log.info("peer %s of swarm %s", format_peer_id(identity.peer), ready.manifest.name)
            log.info("page and metrics: http://%s:%d/", config.web.host, ready.web_port)
            log.info("another machine joins with: shoal join '%s'", ready.reporter.describe_uri())

        await daemon.run(tell)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve())
    return 0


def _run_status(options: argparse.Namespace) -> int:
    from shoal.node.config import WEB_PORT
    from shoal.node.running import read_running
    from shoal.node.status import fetch_status
    from shoal.node.terminal import print_status, watch_status

    host, port = options.web_host, options.web_port or WEB_PORT
    if options.data_dir is not None:
        host, port = read_running(options.data_dir)
    if options.watch:
        return watch_status(lambda: fetch_status(host, port))
    status = fetch_status(host, port)
    if options.json:
        print(status.to_json())
    else:
        print_status(status)
    return 0


def _run_doctor(options: argparse.Namespace) -> int:
    from shoal.node.config import FLAGS
    from shoal.node.doctor import DEADLINE_S, run
    from shoal.node.doctor_findings import Verdict
    from shoal.node.progress import show_progress
    from shoal.node.terminal import print_table

    given = {flag: getattr(options, flag.replace("-", "_"), None) for flag in FLAGS} | {"swarm": options.uri}
    overrides = {flag: value for flag, value in given.items() if value is not None}
    with show_progress("looking at", in_pipe=not options.json) as noticed:
        report = run(options.config, overrides, noticed, DEADLINE_S if options.within is None else options.within)
    if options.json:
        print(report.to_json())
        return 0 if report.takes_part else EXIT_INPUT
    styles = {Verdict.OK: "green", Verdict.WARNING: "yellow", Verdict.PROBLEM: "red", Verdict.NOT_CHECKED: "dim"}
    rows = [((one.verdict, one.check, one.text, one.next_step), styles[one.verdict]) for one in report.findings]
    print_table(("", "", "finding", "next step"), rows)
    answer = "nothing stands in the way of taking part" if report.takes_part else "this machine cannot take part yet"
    print(f"{answer} ({report.took_s:.1f} s)")
    return 0 if report.takes_part else EXIT_INPUT


def _run_create(options: argparse.Namespace) -> int:
    from shoal.node.progress import show_progress
    from shoal.node.swarm_create import create_swarm

    lines: list[str] = []
    with show_progress("describing the model") as noticed:
        code = create_swarm(options, _data_dir(options.data_dir), lines.append, noticed)
    print("\n".join(lines))
    return code


def _run_reroot(options: argparse.Namespace) -> int:
    from shoal.node.reroot import OWNER_KEY_FILE, sign_reroot
    from shoal.protocol.identity import format_peer_id, parse_peer_id

    folder = _data_dir(options.data_dir)
    voters = tuple(dict.fromkeys(parse_peer_id(text) for text in options.voter))
    done = sign_reroot(folder, options.owner_key or folder / OWNER_KEY_FILE, voters)
    print(f"round      {done.round} names new voters and changes nothing else")
    print(f"before     {', '.join(format_peer_id(peer) for peer in done.old_voters)}")
    print(f"from now   {', '.join(format_peer_id(peer) for peer in done.voters)}")
    print(f"next       shoal up --data-dir {folder}   (the others get it from this peer)")
    return 0


def _run_ban(options: argparse.Namespace) -> int:
    from shoal.node.decrees import ban

    return _print_decree(options, lambda folder, key, peer, now_ms: ban(folder, key, peer, options.reason, now_ms))


def _run_unban(options: argparse.Namespace) -> int:
    from shoal.node.decrees import unban

    return _print_decree(options, unban)


def _run_readmit(options: argparse.Namespace) -> int:
    from shoal.crdt.kinds import EntryId
    from shoal.node.decrees import readmit

    try:
        stands = EntryId(bytes.fromhex(options.entry)) if options.entry else None
    except ValueError as error:
        raise ConfigError("--entry", f"{options.entry!r} is no entry id", "see `shoal ledger show`") from error
    return _print_decree(options, lambda folder, key, peer, now_ms: readmit(folder, key, peer, now_ms, stands))


def _run_admit(options: argparse.Namespace) -> int:
    from shoal.node.decrees import admit
    from shoal.protocol.identity import parse_peer_id

    peers = frozenset(map(parse_peer_id, options.peer))
    return _tell_decree(options, lambda folder, key, now_ms: admit(folder, key, peers, now_ms))


def _run_invite(options: argparse.Namespace) -> int:
    from shoal.node.identity_file import OWNER_FILE
    from shoal.node.invitations import find_bootstraps, make_invitation
    from shoal.protocol.identity import format_peer_id

    folder = _data_dir(options.data_dir)
    bootstraps = tuple(options.bootstrap) or find_bootstraps(folder)
    uri = make_invitation(folder, options.owner_key or folder / OWNER_FILE, bootstraps, options.days)
    assert uri.ticket is not None, "that is what was made"
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(uri.ticket.expires_s))
    print(f"invitation {format_peer_id(uri.ticket.invitation.ticket)} (`shoal swarm ban` withdraws it)")
    print(f"until      {until}; whoever has the URI may use it until then: send it privately")
    if not bootstraps:
        print("no address of a member is in it: start the peer of this folder first, or give --bootstrap")
    print(f"join with  shoal join '{uri}'")
    return 0


def _print_decree(
    options: argparse.Namespace, sign: "Callable[[Path, Path, PeerId, int], Batch | AlreadyDecreed]"
) -> int:
    from shoal.protocol.identity import parse_peer_id

    peer = parse_peer_id(options.peer)
    return _tell_decree(options, lambda folder, key, now_ms: sign(folder, key, peer, now_ms))


def _tell_decree(options: argparse.Namespace, sign: "Callable[[Path, Path, int], Batch | AlreadyDecreed]") -> int:
    from shoal.node.decrees import AlreadyDecreed
    from shoal.node.identity_file import OWNER_FILE

    folder = _data_dir(options.data_dir)
    batch = sign(folder, options.owner_key or folder / OWNER_FILE, time.time_ns() // 1_000_000)
    if isinstance(batch, AlreadyDecreed):
        print(f"nothing    {batch.text}: decree {batch.seq} of the owner, entry {batch.entry.hex()}")
        return 0
    print(f"decree     {batch.entries[-1].seq} of the owner, entry {batch.tip.hex()}")
    print(f"next       shoal up --data-dir {folder}   (the others get it from this peer)")
    return 0


def _run_identity(options: argparse.Namespace) -> int:
    from shoal.node.identity_file import load_or_create_identity
    from shoal.protocol.identity import format_peer_id

    print(format_peer_id(load_or_create_identity(_data_dir(options.data_dir) / "identity.key").peer))
    return 0


def _run_export(options: argparse.Namespace) -> int:
    from shoal.node.adapters import write_peft_folder
    from shoal.node.export import read_certified_model, read_retained_model, write_model
    from shoal.node.hf_folder import write_hf_folder
    from shoal.node.output_files import writing

    for flag in ("tokenizer", "weights") if options.format != "hf" else ():
        if getattr(options, flag) is not None:
            raise ConfigError(f"--{flag}", "goes into a folder for transformers", "add --format hf")
    folder = _data_dir(options.data_dir)
    model = read_certified_model(folder) if options.round is None else read_retained_model(folder, options.round)
    with writing("--out", options.out):
        if options.format == "hf":
            write_hf_folder(model, options.out, options.tokenizer, options.weights)
        elif options.format == "peft":
            write_peft_folder(model, options.out)
        else:
            write_model(model, options.out)
    if model.is_snapshot:
        print("the peer is running: this is its newest snapshot; --round takes a later round")
    print(f"{options.out}: {model.params.size:,} parameters at round {model.round}")
    print(f"state root {model.state_root.hex()}")
    return 0


def _run_tokenize(options: argparse.Namespace) -> int:
    from shoal.node.progress import show_progress
    from shoal.node.training.shards import SHARD_TOKENS, tokenize_files
    from shoal.node.training.tokenizer import write_digest

    with show_progress("tokenized") as told:
        size = SHARD_TOKENS if options.shard_tokens is None else options.shard_tokens
        written, digest = tokenize_files(options.text, options.out, options.tokenizer, options.end, size, told)
    if written.notice:
        print(written.notice)
    print(f"{options.out}: {written.tokens:,} tokens in {len(written.paths)} shards, tokenizer {write_digest(digest)}")
    print(f"train on   shoal up --text {options.out} …")
    return 0


def _run_evaluate(options: argparse.Namespace) -> int:
    from shoal.node.evaluate import run_evaluate

    return run_evaluate(options, print)


def _run_checkout(options: argparse.Namespace) -> int:
    from shoal.node.archive import open_archive, write_checkout

    out = options.out or Path(f"checkout-{options.round}")
    with open_archive(_data_dir(options.data_dir)) as archive:
        state = write_checkout(archive, options.round, out)
    begun = f"the snapshot of round {state.start}" if state.start else "round 0"
    print(f"{out}: round {state.head.round}, from {begun} and {state.head.round - state.start} certified updates")
    print(f"state root {state.head.state_root.hex()}")
    return 0


def _run_verify(options: argparse.Namespace) -> int:
    from shoal.node.archive import open_archive
    from shoal.node.audit import EXIT_CODES, Finding, audit_round, audit_rounds, conclude

    with open_archive(_data_dir(options.data_dir)) as archive:
        newest, oldest = archive.certificates.newest, archive.certificates.oldest
        beyond = [number for number in options.round if not 1 <= number <= newest]
        if beyond or not newest:
            fix = f"give a round from 1 to {newest}" if newest else "wait until the first round is certified"
            raise ConfigError("--round", f"{(*beyond, 1)[0]} is not certified here", fix)
        if options.all:
            if oldest > 1:
                print(
                    f"rounds 1 to {oldest - 1} are not kept any more; `shoal ledger verify` checks the trail over them"
                )
            audits = audit_rounds(archive, oldest, newest)
        else:
            audits = (audit_round(archive, number) for number in options.round)
        counts = dict.fromkeys(Finding, 0)
        for audit in audits:
            counts[audit.finding] += 1
            print(f"round {audit.round} {audit.finding}", flush=True)
            for check in audit.checks:
                # Of many rounds that hold one line each is enough.
                if not options.all or check.finding is not Finding.HOLDS:
                    print(f"  {check.name:<13} {check.finding}: {check.detail}")
    if options.all:
        print(", ".join(f"{count} rounds: {finding}" for finding, count in counts.items() if count))
    return EXIT_CODES[conclude(finding for finding, count in counts.items() if count)]


def _run_ledger(options: argparse.Namespace) -> int:
    from shoal.node.ledger_commands import run_ledger

    return run_ledger(options, _data_dir(options.data_dir), print)


def _run_bench(options: argparse.Namespace) -> int:
    from shoal.node.bench.commands import run_bench

    return run_bench(options, _data_dir(getattr(options, "data_dir", None)), print)


def _run_demo(options: argparse.Namespace) -> int:
    from shoal.node.demo import DemoOptions, run_demo

    return run_demo(
        DemoOptions(text=options.text, rounds=options.rounds, folder=options.out.absolute(), report=options.report)
    )
