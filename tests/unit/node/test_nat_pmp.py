"""node/nat_pmp.py against the RFC's bytes, and node/nat_pmp_gateway.py against a router on loopback."""

import pytest

from shoal.node import nat_pmp_gateway
from shoal.node.nat_pmp import (
    ExternalAddress,
    GatewayClock,
    Mapped,
    Refused,
    decode_answer_untrusted,
    encode_address_question,
    encode_mapping_question,
    matches,
)
from shoal.node.nat_pmp_gateway import ANSWERS_QUEUED_MAX, AnswerQueue, open_nat_pmp
from shoal.node.port_mapping import LEASE_S, GatewayFailed, Lease
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from tests.unit.node.gateways import EXTERNAL_IP, OWN_IP, PmpRouter, run_pmp_router


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nat_pmp_gateway, "ANSWER_WAITS_S", (0.02, 0.02))


# -- the codec -------------------------------------------------------------------------------------------------------


def test_questions_are_the_bytes_of_the_rfc() -> None:
    assert encode_address_question() == bytes.fromhex("0000")
    assert encode_mapping_question(9460, 9461, 3600) == bytes.fromhex("0002 0000 24f4 24f5 00000e10")
    assert encode_mapping_question(9460, 9461, 0) == bytes.fromhex("0002 0000 24f4 0000 00000000")


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("0080 0000 00000100 2d000007", ExternalAddress(epoch_s=256, ip="45.0.0.7")),
        (
            "0082 0000 00000100 24f4 24f5 00000e10",
            Mapped(epoch_s=256, internal_port=9460, external_port=9461, lifetime_s=3600),
        ),
        ("0082 0002 00000100", Refused(code=2)),
        ("0080 0003 00000100 00000000", Refused(code=3)),
        ("0281 0001 00000000", Refused(code=1)),
    ],
)
def test_answers_are_read(raw: str, answer: object) -> None:
    assert decode_answer_untrusted(bytes.fromhex(raw)) == answer


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        ("", Refusal.WRONG_LENGTH),
        ("0080 0000 000001", Refusal.WRONG_LENGTH),
        ("0080 0000 00000100 2d0000", Refusal.WRONG_LENGTH),
        ("0080 0000 00000100 2d000007 00", Refusal.WRONG_LENGTH),
        ("0082 0000 00000100 24f4 24f5 00000e10 00", Refusal.WRONG_LENGTH),
        ("0082 0000 00000100 24f4 0000 00000e10", Refusal.OUT_OF_RANGE),
        ("0280 0000 00000100 2d000007", Refusal.WRONG_VERSION),
        ("0081 0000 00000100 24f4 24f5 00000e10", Refusal.UNKNOWN_TYPE),
        ("0000 0000 00000100 2d000007", Refusal.UNKNOWN_TYPE),
        ("00" * 1101, Refusal.WRONG_LENGTH),
    ],
)
def test_everything_else_is_refused(raw: str, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_answer_untrusted(bytes.fromhex(raw))
    assert caught.value.refusal is refusal


def test_an_answer_belongs_to_the_question_of_its_port() -> None:
    question = encode_mapping_question(9460, 9460, 60)
    mapped = Mapped(epoch_s=1, internal_port=9460, external_port=1, lifetime_s=60)
    assert matches(mapped, question) and matches(Refused(code=2), question)
    assert not matches(mapped, encode_mapping_question(9461, 9460, 60))
    assert not matches(ExternalAddress(epoch_s=1, ip="45.0.0.7"), question)
    assert not matches(mapped, encode_address_question())


def test_refusals_have_names_where_the_rfc_gives_them() -> None:
    assert [str(Refused(code=code)) for code in (2, 4, 77)] == ["not authorized", "out of resources", "result 77"]


def test_a_clock_that_stands_back_is_a_restart() -> None:
    clock = GatewayClock()
    assert not clock.note(5000, 100.0)
    assert not clock.note(5060, 160.0)
    assert not clock.note(5112, 220.0)  # an eighth slow
    assert not clock.note(5170, 280.0)
    assert clock.note(3, 340.0)
    assert not clock.note(63, 400.0)
    assert clock.note(64, 500.0)  # it was started anew, so long ago that the epoch has grown again


# -- the socket ------------------------------------------------------------------------------------------------------


async def test_a_port_is_mapped_kept_and_taken_back() -> None:
    async with run_pmp_router() as router:
        gateway = await open_nat_pmp(OWN_IP, router.port)
        assert await gateway.external_ip() == EXTERNAL_IP
        assert await gateway.add(9460, 9460) == Lease(external_port=9460, lease_s=LEASE_S)
        assert await gateway.holds(9460, 9460)
        assert router.mapped == {9460: 9460}
        await gateway.remove(9460, 9460)
        assert router.mapped == {} and not await gateway.holds(9460, 9460)
        await gateway.close()


async def test_the_router_chooses_another_port_where_one_is_taken() -> None:
    async with run_pmp_router(PmpRouter(taken={9460})) as router:
        gateway = await open_nat_pmp(OWN_IP, router.port)
        assert (await gateway.add(9460, 9460)).external_port == 9461
        await gateway.close()


async def test_a_router_that_was_started_anew_holds_nothing() -> None:
    async with run_pmp_router() as router:
        gateway = await open_nat_pmp(OWN_IP, router.port)
        await gateway.add(9460, 9460)
        await gateway.add(9461, 9461)
        router.restart()
        assert not await gateway.holds(9460, 9460)
        await gateway.add(9460, 9460)
        assert await gateway.holds(9460, 9460) and not await gateway.holds(9461, 9461)
        await gateway.close()


@pytest.mark.usefixtures("impatient")
async def test_a_lost_question_is_asked_again() -> None:
    async with run_pmp_router(PmpRouter(lost=1)) as router:
        gateway = await open_nat_pmp(OWN_IP, router.port)
        assert await gateway.external_ip() == EXTERNAL_IP
        assert router.questions == 2
        await gateway.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("router", "failure", "told"),
    [
        (PmpRouter(lost=99), Failure.GATEWAY_SILENT, "does not answer"),
        (PmpRouter(code=2), Failure.GATEWAY_REFUSED, "not authorized"),
        (PmpRouter(answer=b"\2\x81\0\1\0\0\0\0"), Failure.GATEWAY_REFUSED, "unsupported version"),
        (PmpRouter(answer=b"hello there"), Failure.GATEWAY_MALFORMED, "wrong_version"),
        (PmpRouter(answer=b"\0"), Failure.GATEWAY_MALFORMED, "wrong_length"),
    ],
)
async def test_what_went_wrong_has_its_reason(router: PmpRouter, failure: Failure, told: str) -> None:
    async with run_pmp_router(router):
        gateway = await open_nat_pmp(OWN_IP, router.port)
        with pytest.raises(GatewayFailed) as caught:
            await gateway.add(9460, 9460)
        assert caught.value.failure is failure and told in caught.value.detail
        await gateway.close()


async def test_a_host_that_speaks_no_nat_pmp_says_so_at_once() -> None:
    async with run_pmp_router() as router:
        port = router.port
    gateway = await open_nat_pmp(OWN_IP, port)
    with pytest.raises(GatewayFailed) as caught:
        await gateway.external_ip()
    assert caught.value.failure is Failure.GATEWAY_SILENT and "speaks NAT-PMP" in caught.value.detail
    await gateway.close()


async def test_an_answer_to_something_else_is_passed_over() -> None:
    async with run_pmp_router() as router:
        gateway = await open_nat_pmp(OWN_IP, router.port)
        assert await gateway.external_ip() == EXTERNAL_IP
        gateway._answers.put_nowait(bytes.fromhex("0082 0000 00000400 24f4 24f5 00000e10"))
        assert (await gateway.add(9461, 9461)).external_port == 9461
        await gateway.close()


async def test_a_flood_of_answers_is_dropped() -> None:
    answers = AnswerQueue()
    for _ in range(99):
        answers.datagram_received(b"x", (OWN_IP, 5351))
    answers.error_received(OSError("x"))
    assert answers.queue.qsize() == ANSWERS_QUEUED_MAX
