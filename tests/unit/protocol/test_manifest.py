"""The manifest: what a person may write, what its owner signs, and the URI that names it."""

from dataclasses import replace
from typing import Any

import pytest
from blake3 import blake3

from shoal.protocol.admission import AdmissionRule, issue_ticket
from shoal.protocol.errors import ManifestError, ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, PeerId, format_peer_id
from shoal.protocol.layout import Layout, TensorSpec
from shoal.protocol.manifest import (
    BOOTSTRAPS_MAX,
    CONDITIONS,
    DELAYED,
    DILOCO,
    EAGER,
    OVERLAPPED,
    Admission,
    Condition,
    Draft,
    Manifest,
    Outer,
    Rounds,
    SignedManifest,
    SwarmUri,
    Task,
    Training,
    check_draft,
    genesis_head,
    make_manifest,
    parse_draft,
    parse_uri,
    read_manifest_untrusted,
    sign_manifest,
    size_parts,
    task_options,
)
from shoal.protocol.messages import PARTS_MAX, digest_record
from shoal.protocol.quorum import Head, QuorumRule
from shoal.protocol.state import STATE_ELEMENTS_MAX
from shoal.protocol.wire import DELTA_BYTES_MAX, encode_record
from tests.unit.protocol.samples import DRAFT, IDENTITIES, LAYOUT, PEERS, RULES, make_sample_manifest

OWNER = IDENTITIES[0]
MANIFEST = make_sample_manifest()
SIGNED = sign_manifest(MANIFEST, OWNER)
SWARM = digest_record(MANIFEST)
BOOTSTRAP = f"/ip4/203.0.113.5/tcp/9460/p2p/{format_peer_id(PEERS[0])}"
TEXT = """name = "shakespeare"
seed = 7

[task]
kind = "byte_gpt"
width = 64

[training]
inner_steps = 50
round_time_s = 30

[outer]
momentum = 0.9

[rounds]  # the defaults serve small swarms
peers_min = 3
quorum = "two_thirds"

[admission]
rule = "listed"
"""


def refuse_draft(text: str) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        parse_draft(text, "{}")
    return caught.value


def refuse_pieces(draft: Draft, layout: Layout = LAYOUT) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        make_manifest(draft, layout, PEERS[0], PEERS[:1])
    return caught.value


def refuse_signed(raw: bytes, swarm: bytes | None = None) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        read_manifest_untrusted(raw, swarm)
    return caught.value


def refuse_uri(text: str) -> UriError:
    with pytest.raises(UriError) as caught:
        parse_uri(text)
    return caught.value


def flat(elements: int) -> Layout:
    return Layout(tensors=(TensorSpec(name="w", shape=(elements,)),))


# -- drafts ---------------------------------------------------------------------------------------------------------


def test_a_draft_is_read_and_what_it_leaves_out_has_a_default() -> None:
    draft = parse_draft(TEXT, '{"width":64}')
    assert draft == Draft(
        name="shakespeare",
        task=Task(kind="byte_gpt", options='{"width":64}'),
        seed=7,
        training=Training(inner_steps=50, round_time_s=30.0),
        outer=replace(Draft(name="x", task=Task(kind="x")).outer, momentum=0.9),
        rounds=Rounds(peers_min=3, quorum="two_thirds"),
        admission=Admission(rule="listed"),
    )
    assert task_options(TEXT) == {"width": 64}


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        ('name = "shakespeare"', "name = 5", "name (line 1)", "is int, not str"),
        ('name = "shakespeare"', 'name = ""', "name (line 1)", "out of range"),
        ('name = "shakespeare"\n', "", "name", "is missing"),
        ("seed = 7", "seed = -1", "seed (line 2)", "out of range"),
        ("seed = 7", "seed = 7\nsede = 8", "sede (line 3)", "is no known field"),
        ("inner_steps = 50", "inner_steps = 50.0", "training.inner_steps (line 9)", "is float, not int"),
        ("inner_steps = 50", 'inner_steps = "50"', "training.inner_steps (line 9)", "is str, not int"),
        ("inner_steps = 50", "inner_steps = 0", "training.inner_steps (line 9)", "out of range"),
        ("inner_steps = 50", "inner_stepz = 50", "training.inner_stepz (line 9)", "is no known field"),
        ("inner_steps = 50", "inner_steps = true", "training.inner_steps (line 9)", "is bool, not int"),
        ("round_time_s = 30", "round_time_s = nan", "training.round_time_s (line 10)", "out of range"),
        ("momentum = 0.9", "momentum = 1.01", "outer.momentum (line 13)", "out of range"),
        ("momentum = 0.9", 'optimizer = "lion"', "outer.optimizer (line 13)", "'lion' is not allowed"),
        ('"two_thirds"', '"all"', "rounds.quorum (line 17)", "'all' is not allowed"),
        ('"listed"', '"friends"', "admission.rule (line 20)", "'friends' is not allowed"),
        ('rule = "listed"', 'rules = "listed"', "admission.rules (line 20)", "is no known field"),
        ("peers_min = 3", "part_elements = 255", "rounds.part_elements (line 16)", "out of range"),
        ("peers_min = 3", 'codec = "zip"', "rounds.codec (line 16)", "'zip' is not allowed"),
        ("peers_min = 3", 'update_codec = "zip"', "rounds.update_codec (line 16)", "'zip' is not allowed"),
        ("[training]", "[trainning]", "trainning (line 8)", "is no known field"),
        ('kind = "byte_gpt"', "kind = 1", "task.kind (line 5)", "is int, not str"),
        ('kind = "byte_gpt"', 'kind = ""', "task.kind (line 5)", "out of range"),
        ('[task]\nkind = "byte_gpt"\nwidth = 64', 'task = "byte_gpt"', "task (line 4)", "is not a table"),
        ('[task]\nkind = "byte_gpt"\nwidth = 64\n', "", "task", "is missing"),
    ],
)
def test_a_mistake_is_named_by_its_field_and_line(old: str, new: str, field: str, problem: str) -> None:
    assert old in TEXT
    error = refuse_draft(TEXT.replace(old, new))
    assert error.field == field
    assert problem in error.problem
    assert error.fix


def test_text_that_is_no_toml_is_refused_with_its_place() -> None:
    error = refuse_draft('name = "x\nseed = 1')
    assert error.field == "TOML" and "line 1" in error.problem


@pytest.mark.parametrize("text", ["", 'task = "byte_gpt"', "[task]\nwidth = 1", "[task]\nkind = 3"])
def test_a_draft_without_a_kind_of_task_is_refused(text: str) -> None:
    with pytest.raises(ManifestError) as caught:
        task_options(text)
    assert caught.value.field.startswith("task") and "kind =" in caught.value.fix


def test_a_kind_that_is_there_and_no_text_is_not_called_missing() -> None:
    with pytest.raises(ManifestError) as caught:
        task_options("[task]\nkind = 3")
    assert caught.value.field == "task.kind (line 2)" and caught.value.problem == "is no text"


def test_fields_that_do_not_fit_each_other_are_refused_without_a_model() -> None:
    check_draft(DRAFT)
    with pytest.raises(ManifestError, match=r"training\.steps_min"):
        check_draft(replace(DRAFT, training=Training(inner_steps=3, steps_min=4)))


# -- pieces that fit each other -------------------------------------------------------------------------------------


def test_parts_are_fixed_slices_that_cover_the_vector() -> None:
    assert MANIFEST.parts == 4
    assert [MANIFEST.part_range(part) for part in range(4)] == [(0, 256), (256, 512), (512, 768), (768, 900)]
    whole = make_manifest(DRAFT, flat(512), PEERS[0], PEERS[:1])
    assert [whole.part_range(part) for part in range(whole.parts)] == [(0, 256), (256, 512)]


def test_too_many_parts_are_refused_with_the_size_that_fits() -> None:
    assert make_manifest(DRAFT, flat(256 * PARTS_MAX), PEERS[0], PEERS[:1]).parts == PARTS_MAX
    error = refuse_pieces(DRAFT, flat(256 * PARTS_MAX + 1))
    assert error.field == "rounds.part_elements"
    assert error.problem == f"makes {PARTS_MAX + 1} parts, at most {PARTS_MAX}"
    assert error.fix == "use at least 257"


def test_a_model_that_no_snapshot_can_hold_is_refused() -> None:
    large = replace(DRAFT, rounds=replace(RULES, part_elements=1 << 20))
    assert make_manifest(large, flat(STATE_ELEMENTS_MAX), PEERS[0], PEERS[:1]).parts <= PARTS_MAX
    assert refuse_pieces(large, flat(STATE_ELEMENTS_MAX + 1)).field == "task"


@pytest.mark.parametrize(
    ("draft", "field"),
    [
        (replace(DRAFT, rounds=replace(RULES, part_elements=300)), "rounds.part_elements"),
        (replace(DRAFT, rounds=replace(RULES, part_elements=300, update_codec="fp16")), "rounds.part_elements"),
        (replace(DRAFT, rounds=replace(RULES, codec="topk2", update_codec="int8")), "rounds.part_elements"),
        (replace(DRAFT, rounds=replace(RULES, codec="topk8", part_elements=4096)), "rounds.update_codec"),
        (replace(DRAFT, rounds=replace(RULES, presence_timeout_s=3.9)), "rounds.presence_timeout_s"),
        (replace(DRAFT, training=Training(inner_steps=4, steps_min=5)), "training.steps_min"),
        (replace(DRAFT, training=Training(inner_optimizer="muon")), "training.inner_optimizer"),
        (replace(DRAFT, training=Training(schedule="cosine")), "training.schedule_rounds"),
        (replace(DRAFT, training=Training(schedule="linear")), "training.schedule_rounds"),
        (replace(DRAFT, training=Training(schedule_rounds=9)), "training.schedule_rounds"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(draft: Draft, field: str) -> None:
    error = refuse_pieces(draft)
    assert error.field == field and error.fix


@pytest.mark.parametrize("field", ["sender_timeout_s", "owner_timeout_s"])
def test_nobody_gets_longer_than_the_exchange_lasts(field: str) -> None:
    rules = replace(RULES, exchange_timeout_s=20.0)
    check_draft(replace(DRAFT, rounds=replace(rules, **{field: 20.0})))
    error = refuse_pieces(replace(DRAFT, rounds=replace(rules, **{field: 20.5})))
    assert error.field == f"rounds.{field}"
    assert error.problem == "is 20.5, and the whole exchange ends after rounds.exchange_timeout_s, 20"
    assert error.fix == "lower it, or raise rounds.exchange_timeout_s"


def test_muon_wants_weights_in_numbered_layers() -> None:
    draft = replace(DRAFT, training=Training(inner_optimizer="muon", schedule="linear", schedule_rounds=9))
    layout = Layout(tensors=(TensorSpec(name="blocks.0.weight", shape=(30, 30)),))
    assert make_manifest(draft, layout, PEERS[0], PEERS[:1]).training == draft.training
    for name, shape in (("weight", (30, 30)), ("blocks.0.gain", (900,)), ("block0.weight", (30, 30))):
        assert refuse_pieces(draft, Layout(tensors=(TensorSpec(name=name, shape=shape),))).field.endswith("optimizer")


@pytest.mark.parametrize(
    ("strategy", "overlap_steps", "fix"),
    [
        (DILOCO, 1, 'use strategy = "overlapped", "delayed" or "eager", or leave it out'),
        (OVERLAPPED, 0, "use 1 to 19"),
        (DELAYED, 20, "use 1 to 19"),
        (EAGER, 0, "use 1 to 19"),
    ],
)
def test_steps_beside_an_exchange_are_for_strategies_that_make_them(
    strategy: str, overlap_steps: int, fix: str
) -> None:
    training = replace(DRAFT.training, strategy=strategy, overlap_steps=overlap_steps, inner_steps=20)
    error = refuse_pieces(replace(DRAFT, training=training))
    assert (error.field, error.fix) == ("training.overlap_steps", fix)


# What has an effect, per setting: the choice with which it has one, and one with which it has none.
IDLE = [
    ("training.overlap_steps", 3, "strategy", "overlapped", "diloco"),
    ("training.mixing", 0.5, "strategy", "overlapped", "diloco"),
    ("training.mixing", 0.25, "strategy", "overlapped", "delayed"),
    ("training.mixing", 0.5, "strategy", "overlapped", "eager"),
    ("training.schedule_rounds", 9, "schedule", "cosine", "constant"),
    ("training.learning_rate_end", 0.1, "schedule", "linear", "constant"),
    ("outer.momentum", 0.8, "optimizer", "nesterov", "sgd"),
    ("outer.momentum", 0.9, "optimizer", "adam", "sgd"),
    ("outer.momentum_clip", 2.0, "optimizer", "nesterov", "adam"),
    ("outer.momentum_every", 2, "optimizer", "nesterov", "sgd"),
    ("outer.second_moment", 0.99, "optimizer", "adam", "nesterov"),
    ("outer.epsilon", 0.001, "optimizer", "adam", "sgd"),
    ("rounds.residual_kept", 0.9, "codec", "int8", "fp32"),
    ("rounds.reroot_after_s", 86400.0, "quorum", "majority", "two_thirds"),
]
NEEDED = {"overlapped": "overlap_steps = 3", "cosine": "schedule_rounds = 9", "linear": "schedule_rounds = 9"}
NEEDED |= dict.fromkeys(("delayed", "eager"), NEEDED["overlapped"])


def write_draft(field: str, choice: str, chosen: str, value: float | None) -> str:
    table, _, name = field.partition(".")
    lines = [f'{choice} = "{chosen}"', *([] if value is None else [f"{name} = {value}"])]
    if chosen in NEEDED and not NEEDED[chosen].startswith(name):
        lines.append(NEEDED[chosen])
    return "\n".join(('name = "x"', "[task]", 'kind = "none"', f"[{table}]", *lines))


@pytest.mark.parametrize(("field", "value", "choice", "met", "idle"), IDLE)
def test_a_setting_that_has_no_effect_is_refused_where_a_draft_names_it(
    field: str, value: float, choice: str, met: str, idle: str
) -> None:
    used = parse_draft(write_draft(field, choice, met, value), "{}")
    assert make_manifest(used, LAYOUT, PEERS[0], PEERS[:1])
    error = refuse_draft(write_draft(field, choice, idle, value))
    assert error.field == f"{field} (line 6)"
    assert error.problem == f"is not for the {choice} {idle}" and f'"{met}"' in error.fix
    parse_draft(write_draft(field, choice, idle, None), "{}")  # its default is of no account


@pytest.mark.parametrize("one", CONDITIONS, ids=lambda one: one.field)
def test_what_is_so_anyway_may_be_said(one: Condition) -> None:
    assert f"{one.table}.{one.field}" in {field for field, *_ in IDLE}
    if one.idle is not None:
        idle = next(idle for field, _, _, _, idle in IDLE if field == f"{one.table}.{one.field}")
        draft = parse_draft(write_draft(f"{one.table}.{one.field}", one.choice, idle, one.idle), "{}")
        assert make_manifest(draft, LAYOUT, PEERS[0], PEERS[:1])


@pytest.mark.parametrize("field", ["momentum_clip", "momentum_every"])
def test_what_is_done_to_a_momentum_is_for_an_optimizer_that_has_one(field: str) -> None:
    changed = replace(DRAFT, outer=replace(DRAFT.outer, **{field: 2}))
    assert make_manifest(changed, LAYOUT, PEERS[0], PEERS[:1]).outer == changed.outer
    error = refuse_pieces(replace(changed, outer=replace(changed.outer, optimizer="sgd")))
    assert error.field == f"outer.{field}" and "nesterov" in error.fix


def test_adam_has_factors_of_its_own_and_nothing_to_estimate_by() -> None:
    adam = replace(DRAFT, outer=Outer(optimizer="adam", learning_rate=0.01, second_moment=0.95, epsilon=1e-4))
    assert make_manifest(adam, LAYOUT, PEERS[0], PEERS[:1]).outer == adam.outer
    for field in ("second_moment", "epsilon"):
        error = refuse_pieces(replace(DRAFT, outer=replace(DRAFT.outer, **{field: 0.5})))
        assert error.field == f"outer.{field}" and "adam" in error.fix
    eager = replace(adam.training, strategy=EAGER, overlap_steps=1, inner_steps=20)
    assert refuse_pieces(replace(adam, training=eager)).field == "training.strategy"


@pytest.mark.parametrize(
    ("rules", "problem"), [({"quorum": "two_thirds"}, "who do not lie"), ({"fragments": 2}, "one fragment alone")]
)
def test_pairs_are_for_members_who_do_not_lie_and_for_whole_contributions(rules: dict[str, Any], problem: str) -> None:
    draft = replace(DRAFT, training=Training(gossip_after_s=60.0))
    check_draft(draft)
    with pytest.raises(ManifestError, match=problem) as told:
        check_draft(replace(draft, rounds=replace(DRAFT.rounds, **rules)))
    assert told.value.field == "training.gossip_after_s"


@pytest.mark.parametrize("fragments", [1, 3])
def test_each_part_takes_the_turns_of_its_momentum_one_after_the_other(fragments: int) -> None:
    rules = replace(RULES, fragments=fragments)
    manifest = replace(make_sample_manifest(rules=rules), outer=replace(DRAFT.outer, momentum_every=4))
    turns: dict[int, list[int]] = {}
    for number in range(1, 8 * fragments + 1):
        for part in manifest.list_parts(number):
            turns.setdefault(part, []).append(manifest.outer_rates(number).turn)
    assert turns and all(one == [0, 1, 2, 3] * 2 for one in turns.values())


# -- signed manifests -----------------------------------------------------------------------------------------------


def test_a_signed_manifest_comes_back_with_its_swarm_id() -> None:
    assert read_manifest_untrusted(SIGNED) == (MANIFEST, SWARM)
    assert read_manifest_untrusted(SIGNED, SWARM) == (MANIFEST, SWARM)
    assert blake3(encode_record(MANIFEST)).digest() == SWARM
    assert MANIFEST.quorum is QuorumRule.MAJORITY


def test_every_change_makes_another_swarm() -> None:
    changed = [
        replace(MANIFEST, name="tinier"),
        replace(MANIFEST, seed=2),
        replace(MANIFEST, layout=flat(900)),
        replace(MANIFEST, founders=PEERS[1:4]),
        replace(MANIFEST, rounds=replace(RULES, grace_s=2.5)),
        replace(MANIFEST, rounds=replace(RULES, update_codec="int8")),
    ]
    assert len({SWARM, *(digest_record(one) for one in changed)}) == 7


def test_updates_have_the_codec_of_contributions_unless_another_one_is_named() -> None:
    assert Rounds(codec="e3m0").codec_out == "e3m0"
    assert Rounds(codec="e3m0", update_codec="int8").codec_out == "int8"
    draft = parse_draft(TEXT.replace("peers_min = 3", 'codec = "e3m0"\nupdate_codec = "int8"'), "{}")
    assert (draft.rounds.codec, draft.rounds.codec_out) == ("e3m0", "int8")
    manifest = make_manifest(replace(DRAFT, rounds=replace(RULES, update_codec="fp16")), LAYOUT, PEERS[0], PEERS[:4])
    assert read_manifest_untrusted(sign_manifest(manifest, OWNER))[0].rounds.codec_out == "fp16"


def test_a_manifest_of_another_swarm_is_refused() -> None:
    error = refuse_signed(SIGNED, b"x" * 32)
    assert error.refusal is Refusal.WRONG_SWARM
    assert SWARM.hex()[:16] in error.detail


def resign(manifest: Manifest, owner: Identity) -> bytes:
    """What somebody else makes of it."""
    raw = encode_record(manifest)
    return encode_record(SignedManifest(manifest=raw, signature=owner.sign("manifest", blake3(raw).digest(), raw)))


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        (b"", Refusal.MALFORMED),
        (SIGNED[:-1], Refusal.MALFORMED),
        (SIGNED + b"\x00", Refusal.MALFORMED),
        (bytes(DELTA_BYTES_MAX + 1), Refusal.OVERSIZED),
        (resign(MANIFEST, IDENTITIES[1]), Refusal.BAD_SIGNATURE),
        (resign(replace(MANIFEST, founders=()), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, owner=PeerId(b"short")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, rounds=replace(RULES, codec="zip")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, training=Training(inner_optimizer="sgd")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, training=Training(schedule="steps")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, rounds=replace(RULES, update_codec="zip")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, rounds=replace(RULES, update_codec="topk8")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, rounds=replace(RULES, codec="topk8")), OWNER), Refusal.OUT_OF_RANGE),
        (resign(replace(MANIFEST, layout=flat(256 * PARTS_MAX + 1)), OWNER), Refusal.OUT_OF_RANGE),
        (encode_record(SignedManifest(manifest=b"m", signature=bytes(64))), Refusal.MALFORMED),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(raw: bytes, refusal: Refusal) -> None:
    assert refuse_signed(raw).refusal is refusal


def test_who_leaves_out_values_is_told_to_name_a_codec_for_updates() -> None:
    rules = replace(RULES, codec="topk8", part_elements=4096)
    error = refuse_pieces(replace(DRAFT, rounds=rules))
    assert "topk8" in error.problem and "int8" in error.fix and "topk" not in error.fix
    manifest = make_manifest(replace(DRAFT, rounds=replace(rules, update_codec="int8")), LAYOUT, PEERS[0], PEERS[:4])
    assert read_manifest_untrusted(sign_manifest(manifest, OWNER))[0] == manifest


def test_a_refused_field_of_a_manifest_is_named() -> None:
    sparse = resign(replace(MANIFEST, rounds=replace(RULES, codec="topk8")), OWNER)
    assert refuse_signed(sparse).detail.startswith("manifest.rounds.update_codec is nil")
    many = resign(replace(MANIFEST, layout=flat(256 * PARTS_MAX + 1)), OWNER)
    assert refuse_signed(many).detail == f"manifest.rounds.part_elements makes {PARTS_MAX + 1} parts"
    slow = resign(replace(MANIFEST, rounds=replace(RULES, grace_s=-1.0)), OWNER)
    assert refuse_signed(slow).detail.startswith("Manifest.rounds.grace_s: value -1.0")


def test_who_may_take_part_is_the_manifests_to_say() -> None:
    assert MANIFEST.admission_rule is AdmissionRule.OPEN
    swarms = set()
    for rule in AdmissionRule:
        changed = make_manifest(replace(DRAFT, admission=Admission(rule=rule.value)), LAYOUT, PEERS[0], PEERS[:4])
        read, swarm = read_manifest_untrusted(sign_manifest(changed, OWNER))
        assert read.admission_rule is rule
        swarms.add(swarm)
    assert len(swarms) == len(AdmissionRule)
    odd = resign(replace(MANIFEST, admission=Admission(rule="friends")), OWNER)
    assert refuse_signed(odd).detail.startswith("Manifest.admission.rule: 'friends' is none of")


def test_only_the_owner_signs() -> None:
    with pytest.raises(AssertionError, match="only its owner"):
        sign_manifest(MANIFEST, IDENTITIES[1])


def test_round_0_is_the_manifest_voted_on_by_its_founders() -> None:
    assert genesis_head(MANIFEST, SWARM, b"r" * 32) == Head(
        round=0, digest=SWARM, state_root=b"r" * 32, voters=PEERS[:4]
    )


# -- URIs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bootstraps", [(), (BOOTSTRAP,), (BOOTSTRAP, "/dns4/example.org/tcp/1/p2p/x&y=z %+#")])
def test_a_uri_comes_back(bootstraps: tuple[str, ...]) -> None:
    uri = SwarmUri(swarm=SWARM, bootstraps=bootstraps)
    assert parse_uri(str(uri)) == uri
    assert parse_uri(f"  {uri}\n") == uri


def test_a_uri_is_readable() -> None:
    assert str(SwarmUri(swarm=SWARM, bootstraps=(BOOTSTRAP,))) == f"shoal://{SWARM.hex()}?bootstrap={BOOTSTRAP}"


def test_an_invitation_goes_with_the_uri() -> None:
    ticket = issue_ticket(OWNER, SWARM, b"t" * 32, 1_800_000_000)
    for bootstraps in ((), (BOOTSTRAP,)):
        uri = SwarmUri(swarm=SWARM, bootstraps=bootstraps, ticket=ticket)
        assert parse_uri(str(uri)) == uri
        assert str(uri).endswith(f"invite={ticket}")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "scheme"),
        (f"shoal://{SWARM.hex()}?invite=", "invite"),
        (f"shoal://{SWARM.hex()}?invite=z&invite=z", "invite"),
        (f"shoal://{SWARM.hex()}?bootstrap={BOOTSTRAP}&invite={'2' * 9000}", "invite"),
        ("http://example.org", "scheme"),
        (SWARM.hex(), "scheme"),
        ("shoal://", "swarm id"),
        ("shoal://[", "URI"),
        ("shoal://℀", "URI"),
        (f"shoal://{SWARM.hex()[:-1]}", "swarm id"),
        (f"shoal://{SWARM.hex()}00", "swarm id"),
        (f"shoal://{'z' * 64}", "swarm id"),
        (f"shoal://{SWARM.hex()}?boot={BOOTSTRAP}", "query"),
        (f"shoal://{SWARM.hex()}?bootstrap={BOOTSTRAP}&x=1", "query"),
        (f"shoal://{SWARM.hex()}?bootstrap=", "bootstrap"),
        (f"shoal://{SWARM.hex()}?bootstrap=203.0.113.5:9460", "bootstrap"),
        (f"shoal://{SWARM.hex()}?bootstrap=/ip4/203.0.113.5/tcp/9460", "bootstrap"),
        (f"shoal://{SWARM.hex()}?" + "&".join([f"bootstrap={BOOTSTRAP}"] * (BOOTSTRAPS_MAX + 1)), "bootstrap"),
    ],
)
def test_a_piece_of_a_uri_that_is_wrong_is_named(text: str, field: str) -> None:
    error = refuse_uri(text)
    assert error.field == field
    assert error.fix


def test_a_uri_error_says_what_was_given() -> None:
    assert "'boot'" in refuse_uri(f"shoal://{SWARM.hex()}?boot=1").problem
    assert "'/ip4/1.2.3.4'" in refuse_uri(f"shoal://{SWARM.hex()}?bootstrap=/ip4/1.2.3.4").problem


@pytest.mark.parametrize(
    ("elements", "part_elements"),
    [
        (1, 1 << 18),
        (1 << 23, 1 << 18),
        ((1 << 23) + 1, 1 << 19),
        (1 << 24, 1 << 19),
        ((1 << 24) + 1, 1 << 20),
        (51_000_000, 1 << 20),
        (10**9, 1 << 20),
    ],
)
def test_parts_have_a_size_that_fits_the_model(elements: int, part_elements: int) -> None:
    draft = parse_draft(TEXT, "{}")
    sized = size_parts(draft, TEXT, elements)
    assert sized.rounds.part_elements == part_elements
    assert replace(sized, rounds=draft.rounds) == draft


def test_a_size_that_the_draft_gives_stays() -> None:
    text = TEXT.replace("[rounds]", "[rounds]\npart_elements = 262144")
    draft = parse_draft(text, "{}")
    assert size_parts(draft, text, 10**9) == draft
    assert size_parts(parse_draft('name = "x"\n[task]\nkind = "y"', "{}"), 'name = "x"', 10).rounds == Rounds()
