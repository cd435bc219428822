"""Catch-up over real tensor links: replay, snapshots from several donors, donors that die, interruptions."""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node.ledger_store import StoreError
from shoal.node.partial_snapshot import PartialSnapshot
from shoal.protocol.codecs import Float32s
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.fetch_plan import ASKS_PER_PIECE_MAX
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    CERTIFICATES_PER_ANSWER,
)
from shoal.protocol.quorum import Head
from shoal.protocol.state import StateVector
from tests.unit.node.catchup_samples import (
    CHUNKS,
    FAR,
    LONG,
    NEWCOMER,
    SNAPSHOT,
    assert_same_state,
    assert_untouched,
    keep_updates,
    open_newcomer,
    open_swarm,
    rewrite_answers,
    serve_instead,
    short_hope,
    wait_for_all,
)
from tests.unit.node.node_samples import (
    TINY_ELEMENTS,
    WIDE_ELEMENTS,
    fill_folder,
    make_chain,
    make_samples,
    open_peer,
    wait_until,
)

__all__ = ["short_hope"]  # a fixture

# -- replay ----------------------------------------------------------------------------------------------------------


async def test_missed_rounds_are_replayed_with_parts_from_both_donors(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 5) as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, 5)
        assert_same_state(newcomer, donors[1])
        assert newcomer.state.load_certificates(1, 9) == chain.certificates
        assert all(donor.served for donor in donors)
        served = donors[0].served + donors[1].served
        # A part may be asked of a second donor where the first one is late.
        assert set(served) == set(chain.blobs) and max(served.values()) <= ASKS_PER_PIECE_MAX
        assert newcomer.core.round == 6
        assert newcomer.state.apply_s is not None and newcomer.state.apply_s > 0, "the next choice of a way knows it"


async def test_updates_are_fetched_in_their_own_codec(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1, codec="ternary", update_codec="fp16") as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, 3)
        assert_same_state(newcomer, donors[0])
        assert sum(map(len, chain.blobs.values())) == 3 * 2 * TINY_ELEMENTS
        assert newcomer.catch_up._update_bytes == 2 * TINY_ELEMENTS


async def test_updates_of_fragments_are_replayed(tmp_path: Path) -> None:
    # Of three parts rounds 1, 3 and 5 exchange the first and the last, which is a shorter one, the others the second.
    async with open_swarm(tmp_path, 5, fragments=2) as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, 5)
        assert_same_state(newcomer, donors[1])
        assert [len(one.result.parts) for one in newcomer.state.load_certificates(1, 9)] == [2, 1, 2, 1, 2]
        assert set(donors[0].served + donors[1].served) == set(chain.blobs)


async def test_more_rounds_than_one_answer_holds_are_replayed(tmp_path: Path) -> None:
    rounds = CERTIFICATES_PER_ANSWER + 2
    async with open_swarm(tmp_path, rounds, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, rounds)
        assert_same_state(newcomer, donors[0])


async def test_replay_goes_as_far_as_the_donor_leads(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, LONG)
        assert_same_state(newcomer, donors[0])


async def test_a_donor_that_dies_between_two_parts_costs_nothing(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 6) as (newcomer, donors, _):
        dying = donors[0]
        honest = dying.exchange.serve

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            if newcomer.core.head.round >= 2:
                dying.spawn(dying.links.stop())
                return None
            return await honest(peer, digest)

        dying.exchange.serve = serve  # type: ignore[method-assign]
        await newcomer.catch_up.run(donors[1].me, 6)
        assert_same_state(newcomer, donors[1])


async def test_a_donor_whose_control_connection_ends_is_followed_by_another(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, CERTIFICATES_PER_ANSWER + 4) as (newcomer, donors, _):
        dying = donors[0]

        def stop_after_the_first(message: object) -> object:
            dying.spawn(dying.control.stop())
            return message

        rewrite_answers(dying, stop_after_the_first)
        await newcomer.catch_up.run(dying.me, CERTIFICATES_PER_ANSWER + 4)
        assert_same_state(newcomer, donors[1])
        assert newcomer.donor_failures[dying.me] >= 1


async def test_only_one_catch_up_runs_at_a_time(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, 3, donors=1) as (newcomer, donors, _):
        asked = Counter[str]()
        rewrite_answers(donors[0], lambda message: (asked.update([type(message).__name__]), message)[1])
        await asyncio.gather(*(newcomer.catch_up.run(donors[0].me, 3) for _ in range(3)))
        assert asked["CertificatesAnswer"] == 1
        assert_same_state(newcomer, donors[0])


# -- by snapshot -----------------------------------------------------------------------------------------------------


async def test_far_behind_takes_a_snapshot_from_several_donors_and_replays_the_rest(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=3, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        assert index.chunks == CHUNKS
        wait_for_all(donors)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[2])
        assert newcomer.state.head == chain.heads[FAR]
        chunks = {index.digest(number) for number in range(CHUNKS)}
        served = sum((donor.served for donor in donors), Counter[bytes]())
        # Towards the end a piece may be asked of a second donor.
        assert max(served[digest] for digest in chunks) <= ASKS_PER_PIECE_MAX
        assert all(chunks & set(donor.served) for donor in donors)
        replayed = {part.digest for one in chain.certificates[SNAPSHOT:] for part in one.result.parts}
        assert set(served) == chunks | replayed
        assert newcomer.state.stores.snapshots.rounds() == [SNAPSHOT]
        assert [one.result.round for one in newcomer.state.load_certificates(1, 99)] == list(range(1, FAR + 1))
        assert list((newcomer.folder / "catchup").iterdir()) == []


async def test_one_round_is_jumped_over_where_nobody_has_its_update_any_more(tmp_path: Path) -> None:
    """Those who made the round have gone, and the donor came by its snapshot."""
    swarm = make_samples()
    chain = make_chain(swarm, FAR, (SNAPSHOT,))
    before, after = chain.certificates[: SNAPSHOT - 1], chain.certificates[SNAPSHOT:]
    fill_folder(swarm, tmp_path / str(NEWCOMER), keep_updates(replace(chain, certificates=before, states={}), before))
    fill_folder(swarm, tmp_path / "0", keep_updates(chain, after))
    async with open_peer(swarm, 0, tmp_path) as donor:
        await donor.providers.refresh()
        assert donor.presence.describe().updates_from == SNAPSHOT + 1
        async with open_newcomer(swarm, tmp_path, [donor]) as newcomer:
            assert newcomer.state.head == chain.heads[SNAPSHOT - 1]
            await newcomer.catch_up.run(donor.me, FAR)
            assert newcomer.state.head == chain.heads[FAR]
            assert_same_state(newcomer, donor)
            assert newcomer.catch_up.snapshots_taken == 1


async def test_what_a_snapshot_brought_survives_a_restart(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR) as (newcomer, donors, chain):
        await newcomer.catch_up.run(donors[0].me, FAR)
        swarm = newcomer.swarm
        await newcomer.stop()
        async with open_peer(swarm, NEWCOMER, tmp_path) as again:
            assert again.state.head == chain.heads[FAR]
            assert np.array_equal(again.params, donors[0].params)


async def test_without_a_snapshot_a_long_log_is_replayed(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, LONG + 2, donors=1) as (newcomer, donors, _):
        await newcomer.catch_up.run(donors[0].me, LONG + 2)
        assert_same_state(newcomer, donors[0])
        # The own snapshots along the way are those of any other peer.
        assert newcomer.state.stores.snapshots.rounds() != []


async def test_a_donor_that_dies_in_the_middle_of_a_snapshot_costs_a_retry(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        dying = donors[0]
        honest = dying.exchange.serve
        count = 0

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            nonlocal count
            count += 1
            if count == 2:
                dying.spawn(dying.links.stop())
            return await honest(peer, digest) if count == 1 else None

        dying.exchange.serve = serve  # type: ignore[method-assign]
        await newcomer.catch_up.run(donors[1].me, FAR)
        assert_same_state(newcomer, donors[1])
        index = chain.index(SNAPSHOT)
        assert sum(donors[1].served[index.digest(number)] for number in range(CHUNKS)) >= CHUNKS - 1


async def test_an_interrupted_snapshot_goes_on_from_the_chunks_that_are_there(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        chunks = [index.digest(number) for number in range(CHUNKS)]
        held_back = set(chunks[-2:])
        honest = donors[0].exchange.serve
        asked = Counter[bytes]()

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            asked[digest] += 1
            if digest in held_back:
                await asyncio.Event().wait()
            return await honest(peer, digest)

        donors[0].exchange.serve = serve  # type: ignore[method-assign]
        running = asyncio.create_task(newcomer.catch_up.run(donors[0].me, FAR))
        await wait_until(lambda: f"chunk {CHUNKS - 2} of {CHUNKS}" in newcomer.catch_up.detail)
        await wait_until(lambda: all(asked[digest] for digest in held_back))
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        assert_untouched(newcomer, chain)
        await newcomer.stop()

        held_back.clear()
        asked.clear()
        async with open_newcomer(donors[0].swarm, tmp_path, donors) as again:
            await again.catch_up.run(donors[0].me, FAR)
            assert_same_state(again, donors[0])
        assert {digest: asked[digest] for digest in chunks} == {digest: int(digest in chunks[-2:]) for digest in chunks}


async def test_a_chunk_that_the_disk_has_spoilt_is_fetched_again(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1, elements=WIDE_ELEMENTS) as (
        newcomer,
        donors,
        chain,
    ):
        index = chain.index(SNAPSHOT)
        partial = PartialSnapshot(newcomer.folder / "catchup", index)
        for number in range(CHUNKS):
            span = index.span(number)
            vector = chain.states[SNAPSHOT][span.vector is StateVector.MOMENTUM]
            raw = bytearray(vector.tobytes()[span.start : span.stop])
            raw[0] ^= number == 1
            partial.write(number, memoryview(raw))
        partial.close()
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[0])
        chunks = [index.digest(number) for number in range(CHUNKS)]
        assert [donors[0].served[digest] for digest in chunks] == [0, 1, 0, 0, 0, 0]


async def test_one_partial_file_is_kept_at_a_time(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
        folder = newcomer.folder / "catchup"
        folder.mkdir()
        for number in (8, 16):
            (folder / f"{number:08d}.{'0' * 16}.partial").write_bytes(b"of a snapshot that nobody has any more")
        serve_instead(donors[0], lambda raw: None)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert [path.name[:8] for path in folder.iterdir()] == [f"{SNAPSHOT:08d}"]
        assert_untouched(newcomer, chain)


async def test_a_disk_that_fails_ends_the_catch_up_and_it_may_begin_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_swarm(tmp_path, FAR, donors=1) as (newcomer, donors, chain):
        obstacle = newcomer.folder / "catchup"
        obstacle.write_bytes(b"a file where a folder should be")
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert "the disk fails" in caplog.text
        assert_untouched(newcomer, chain)
        obstacle.unlink()
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[0])


async def test_while_a_snapshot_is_taken_over_the_updates_behind_it_come(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):
        behind = [part.digest for one in chain.certificates[SNAPSHOT:] for part in one.result.parts]
        blobs, install = newcomer.state.stores.blobs, newcomer.driver.install
        assert behind and not any(map(blobs.has, behind))

        async def install_late(head: Head, params: Float32s, momentum: Float32s) -> None:
            await wait_until(lambda: all(map(blobs.has, behind)))
            assert newcomer.state.head.round == 0
            await install(head, params, momentum)

        newcomer.catch_up._ports = replace(newcomer.catch_up._ports, install=install_late)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert_same_state(newcomer, donors[0])
        assert newcomer.catch_up.snapshots_taken == 1


async def test_a_snapshot_that_cannot_be_taken_over_leaves_nothing_running(tmp_path: Path) -> None:
    async with open_swarm(tmp_path, FAR, elements=WIDE_ELEMENTS) as (newcomer, donors, chain):

        async def fail(head: Head, params: Float32s, momentum: Float32s) -> None:
            raise StoreError(tmp_path, Failure.DISK_FULL, "the disk is full", "make space")

        before = asyncio.all_tasks()
        newcomer.catch_up._ports = replace(newcomer.catch_up._ports, install=fail)
        await newcomer.catch_up.run(donors[0].me, FAR)
        assert newcomer.state.head == chain.heads[0] and not newcomer.catch_up.active
        assert not [task for task in asyncio.all_tasks() - before if "_replay" in repr(task)]
