"""What a ledger begins behind, when nobody keeps the certificates that it follows from: the word of enough voters."""

from collections.abc import Mapping

import pytest
from blake3 import blake3

from shoal.crdt.certified import ChainBase, Credit, CreditRecord
from shoal.node.control import PeerUnreachable
from shoal.node.ledger_base import ask_for_base, fits
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import BASE_PIECE_BYTES_MAX, GetLedgerBase, LedgerBaseAnswer
from shoal.protocol.quorum import QuorumRule
from shoal.protocol.trail import Anchor
from tests.unit.protocol.samples import PEERS

VOTERS = PEERS[:4]
RULE = QuorumRule.TWO_THIRDS  # two of four are so many that one of them does not lie


def make_base(tokens: int, peers: int = 2, round_number: int = 256) -> ChainBase:
    credit = tuple(
        CreditRecord(peer=number.to_bytes(32, "big"), credit=Credit(tokens=tokens, rounds=3)) for number in range(peers)
    )
    return ChainBase(round=round_number, digest=b"d" * 32, voters=VOTERS, credit=credit)


class Voters:
    """What each of them answers; None does not answer."""

    def __init__(self, bases: Mapping[bytes, ChainBase | None]) -> None:
        self._bases = bases
        self.asked: list[tuple[bytes, int]] = []

    async def ask(self, peer: bytes, question: object) -> object:
        assert isinstance(question, GetLedgerBase)
        self.asked.append((peer, question.offset))
        base = self._bases[peer]
        if base is None:
            raise PeerUnreachable(PeerId(peer), Failure.PEER_LOST, "nobody there")
        raw = base.encode()
        piece = raw[question.offset : question.offset + BASE_PIECE_BYTES_MAX]
        return LedgerBaseAnswer(round=base.round, digest=blake3(raw).digest(), nbytes=len(raw), piece=piece)


TRUE, LIE = make_base(100), make_base(999)


@pytest.mark.parametrize(
    ("said", "believed"),
    [
        ((TRUE, TRUE, None, None), TRUE),
        ((LIE, TRUE, TRUE, None), TRUE),
        ((LIE, TRUE, None, None), None),
        ((LIE, None, None, None), None),
        ((make_base(100, round_number=0),) * 4, None),
    ],
)
async def test_so_many_voters_must_say_the_same_that_one_of_them_does_not_lie(
    said: tuple[ChainBase | None, ...], believed: ChainBase | None
) -> None:
    voters = Voters(dict(zip(VOTERS, said, strict=True)))
    assert await ask_for_base(voters.ask, VOTERS, VOTERS, RULE) == believed


async def test_nobody_is_asked_where_too_few_voters_are_there() -> None:
    voters = Voters(dict.fromkeys(VOTERS, TRUE))
    assert await ask_for_base(voters.ask, VOTERS, (VOTERS[0], PEERS[5]), RULE) is None
    assert not voters.asked


async def test_a_sum_of_many_peers_comes_in_pieces() -> None:
    large = make_base(100, peers=4096)
    voters = Voters(dict.fromkeys(VOTERS, large))
    assert await ask_for_base(voters.ask, VOTERS, VOTERS, RULE) == large
    assert (VOTERS[0], BASE_PIECE_BYTES_MAX) in voters.asked


async def test_bytes_that_are_not_what_was_named_are_asked_of_the_next_one() -> None:
    class Cheating(Voters):
        async def ask(self, peer: bytes, question: object) -> object:
            answer = await super().ask(peer, question)
            assert isinstance(answer, LedgerBaseAnswer)
            cut = answer.piece[:-1] + bytes([answer.piece[-1] ^ 1])
            return answer if peer != VOTERS[0] else LedgerBaseAnswer(
                round=answer.round, digest=answer.digest, nbytes=answer.nbytes, piece=cut
            )  # fmt: skip

    voters = Cheating(dict.fromkeys(VOTERS, TRUE))
    assert await ask_for_base(voters.ask, VOTERS, VOTERS, RULE) == TRUE


def test_it_must_end_where_the_own_log_says() -> None:
    anchor = Anchor(round=TRUE.round, digest=TRUE.digest, voters=TRUE.voters)
    assert fits(TRUE, anchor)
    assert not fits(TRUE, None)
    assert not fits(TRUE, Anchor(round=TRUE.round, digest=b"x" * 32, voters=TRUE.voters))
    assert not fits(TRUE, Anchor(round=TRUE.round, digest=TRUE.digest, voters=TRUE.voters[:1]))
