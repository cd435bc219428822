"""The owner's bans at work: each is told once, a lifted one, too; who is banned itself tries rarely."""

from shoal.crdt.entries import Batch, decode_batch_untrusted
from shoal.crdt.kinds import BanBody, EntryId, Kind
from shoal.crdt.ledger import Draft, Ledger
from shoal.node.ban_watch import BANNED_RETRY_S, BannedTries, BanPorts, BanWatch, find_ban, tell_own_ban
from shoal.node.decree_exchange import DECREES_PER_ANSWER, list_newest_decrees
from shoal.node.ledger_sync import make_rules
from shoal.protocol.identity import PeerId, format_peer_id
from tests.unit.node.node_samples import make_samples
from tests.unit.protocol.samples import IDENTITIES, PEERS

NOW_MS = 1_700_000_000_000
ME, OTHER = PEERS[1], PEERS[2]
RULES = make_rules(make_samples().manifest, make_samples().id)


class Rig:
    """The owner's ledger, and the watch of a peer that has the same one."""

    def __init__(self) -> None:
        self.ledger = Ledger(identity=IDENTITIES[0], rules=RULES)
        self.ended: list[tuple[PeerId, str]] = []
        self.lifted: list[PeerId] = []
        self.told: list[tuple[str, bool]] = []
        ports = BanPorts(
            end=lambda peer, reason: self.ended.append((peer, reason)),
            lifted=self.lifted.append,
            tell=lambda text, banned: self.told.append((text, banned)),
        )
        self.watch = BanWatch(ME, self.ledger.standing, ports)

    def ban(self, peer: PeerId, reason: str = "it lies") -> EntryId:
        return self._write(BanBody(peer=peer, reason=reason, removes=())).tip

    def lift(self, *bans: EntryId) -> None:
        self._write(BanBody(peer=b"", reason="", removes=bans))

    def _write(self, body: BanBody) -> Batch:
        batch = self.ledger.write([Draft(kind=Kind.BAN, body=body)], NOW_MS)
        assert self.ledger.accept(batch).accepted
        return batch


def test_a_ban_of_another_peer_is_told_once_and_so_is_its_end() -> None:
    rig = Rig()
    entry = rig.ban(OTHER)
    rig.watch.look()
    rig.watch.look()
    assert (rig.ended, rig.lifted, rig.told) == ([(OTHER, "it lies")], [], [])
    rig.lift(entry)
    rig.watch.look()
    rig.watch.look()
    assert (len(rig.ended), rig.lifted, rig.told) == (1, [OTHER], [])


def test_the_own_ban_is_told_once_with_the_decree_and_the_next_step_and_so_is_its_end() -> None:
    rig = Rig()
    entry = rig.ban(ME)
    rig.watch.look()
    rig.watch.look()
    ((text, banned),) = rig.told
    assert banned and f"by decree {entry.hex()[:16]} (it lies)" in text
    assert f"`shoal swarm unban {format_peer_id(ME)}`" in text and "every 60 s" in text
    ban = find_ban(rig.ledger.standing, ME)
    assert ban is not None and text.startswith(tell_own_ban(ban))
    rig.lift(entry)
    rig.watch.look()
    assert [banned for _, banned in rig.told] == [True, False]
    assert (rig.ended, rig.lifted, find_ban(rig.ledger.standing, ME)) == ([], [], None)


def test_a_banned_peer_tries_each_thing_once_in_a_while() -> None:
    rig = Rig()
    tries = BannedTries(ME, rig.ledger.standing)
    assert all(tries.may_try("catch-up", at) for at in (0.0, 0.1, 0.2)), "it is not banned"
    rig.ban(OTHER)
    assert tries.may_try("catch-up", 0.3) and tries.may_try("catch-up", 0.3), "another peer is"
    entry = rig.ban(ME)
    assert [tries.may_try("catch-up", at) for at in (1.0, 1.1, BANNED_RETRY_S)] == [True, False, False]
    assert tries.may_try("a dial", 2.0)
    assert [tries.may_try("catch-up", BANNED_RETRY_S + at) for at in (1.0, 1.1)] == [True, False]
    rig.lift(entry)
    assert tries.may_try("catch-up", BANNED_RETRY_S + 1.2)


def test_of_a_long_chain_the_end_is_shown_to_who_is_banned() -> None:
    rig = Rig()
    for number in range(DECREES_PER_ANSWER):
        rig.ban(OTHER, str(number))
    reader = Ledger(identity=IDENTITIES[1], rules=RULES)
    for raw in list_newest_decrees(rig.ledger).batches:
        reader.accept(decode_batch_untrusted(raw))
    assert len(reader.standing.bans) == DECREES_PER_ANSWER
    rig.ban(ME)
    shown = list_newest_decrees(rig.ledger)
    assert len(shown.batches) <= DECREES_PER_ANSWER
    for raw in shown.batches:
        reader.accept(decode_batch_untrusted(raw))
    assert ME in reader.standing.banned
