"""The web port over real loopback connections."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from shoal.node import web
from shoal.node.happenings import Happening, HappeningFeed, HappeningKind, Reader, Severity
from shoal.node.metrics import Metrics
from shoal.node.status import Status, fetch_status
from shoal.node.web import CLIENTS_MAX, CONNECTIONS_MAX, PortTakenError, WebServer, WebSources
from shoal.protocol.errors import ConfigError
from tests.unit.node.node_samples import PATIENCE_S

STATIC = Path(web.__file__).parent / "static"


class Feed(HappeningFeed):
    """Knows when a reader has left."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = asyncio.Event()
        self.left = asyncio.Event()

    @contextmanager
    def read(self) -> Iterator[Reader]:
        self.reading.set()
        with super().read() as reader:
            try:
                yield reader
            finally:
                self.left.set()


class Daemon:
    """What the server asks, and how often it did."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.now = 100.0
        self.built = 0
        self.rendered = 0
        self.feed = Feed()
        self.metrics = Metrics()
        self.certificates: Callable[[int], Awaitable[bytes]] | None = None

    def make_status(self) -> Status:
        self.built += 1
        return self.status

    def render(self) -> bytes:
        self.rendered += 1
        return self.metrics.render()

    def make_server(self, port: int = 0) -> WebServer:
        sources = WebSources(
            status=self.make_status, metrics=self.render, feed=self.feed, certificates=self.certificates
        )
        return WebServer("127.0.0.1", port, sources, clock=lambda: self.now)


@asynccontextmanager
async def served(daemon: Daemon) -> AsyncIterator[aiohttp.ClientSession]:
    server = daemon.make_server()
    port = await server.start()
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        await server.stop()


async def read_event(answer: aiohttp.ClientResponse) -> tuple[str, object]:
    kind = (await answer.content.readline()).decode().removeprefix("event: ").strip()
    data = json.loads((await answer.content.readline()).decode().removeprefix("data: "))
    assert await answer.content.readline() == b"\n"
    return kind, data


def make_happening(text: str) -> Happening:
    return Happening(at_s=1.0, severity=Severity.WARNING, kind=HappeningKind.PEER_LOST, text=text)


async def test_a_page_of_certificates_is_given_from_a_round_on(status: Status) -> None:
    daemon = Daemon(status)
    asked: list[int] = []
    reading = 0

    async def certificates(first: int) -> bytes:
        nonlocal reading
        reading += 1
        assert reading == 1, "one at a time"
        asked.append(first)
        await asyncio.sleep(0)
        reading -= 1
        return b"page" * first

    async with served(daemon) as session, session.get("/certificates?first=1") as answer:
        assert answer.status == 404, "a server without a log"
    daemon.certificates = certificates
    async with served(daemon) as session:
        for query in ("", "?first=", "?first=-1", "?first=1e3", "?first=" + "9" * 19, "?first=%C2%B2"):
            async with session.get("/certificates" + query) as answer:
                assert answer.status == 404, query
        assert asked == []

        async def ask(first: int) -> bytes:
            async with session.get(f"/certificates?first={first}") as answer:
                assert (answer.status, answer.content_type) == (200, "application/octet-stream")
                return await answer.read()

        assert await asyncio.gather(*(ask(first) for first in (3, 1, 2))) == [b"page" * 3, b"page", b"page" * 2]
        assert sorted(asked) == [1, 2, 3]


async def test_the_page_is_served_and_may_load_nothing_from_elsewhere(status: Status) -> None:
    async with served(Daemon(status)) as session:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            async with session.get(path) as answer:
                assert (answer.status, answer.content_type, answer.charset) == (200, kind, "utf-8")
                assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                assert "unsafe" not in answer.headers["Content-Security-Policy"]
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                body = (await answer.text()).replace("http://www.w3.org/2000/svg", "")
                assert not re.search(r"https?:|//[a-z]", body.replace("// ", "")), "no external resource"


def test_the_script_finds_its_elements() -> None:
    script, markup = (STATIC / "page.js").read_text(), (STATIC / "index.html").read_text()
    wanted = set(re.findall(r'\bat\("([a-z-]+)"\)', script))
    assert wanted
    assert wanted <= set(re.findall(r'\bid="([a-z-]+)"', markup))
    assert "innerHTML" not in script, "text of other peers must not become markup"


async def test_metrics_are_rendered_at_most_once_a_second(status: Status) -> None:
    daemon = Daemon(status)
    async with served(daemon) as session:
        for advance, rendered in ((0.0, 1), (0.9, 1), (0.2, 2), (0.0, 2)):
            daemon.now += advance
            async with session.get("/metrics") as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert "shoal_round 0.0" in await answer.text()
            assert daemon.rendered == rendered


async def test_the_status_is_what_the_command_line_fetches(status: Status) -> None:
    daemon = Daemon(status)
    async with served(daemon) as session:
        url = (await session.head("/healthz")).url
        assert await asyncio.to_thread(fetch_status, "127.0.0.1", url.port or 0) == status
        async with session.get("/status.json") as answer:
            assert answer.content_type == "application/json"
        assert daemon.built == 1, "two answers within the cache's time are one status"


def test_addresses_of_other_peers_are_for_this_machine_only(status: Status) -> None:
    server = Daemon(status).make_server()
    for remote in ("127.0.0.1", "::1"):
        assert "203.0.113.2:9461" in server.status_json(remote)
    for elsewhere in ("203.0.113.9", None):
        told = Status.from_json(server.status_json(elsewhere))
        assert {row.address for row in told.peers} == {""}
        assert replace(told, peers=()) == replace(status, peers=())


async def test_health_and_readiness_give_reasons(status: Status) -> None:
    daemon = Daemon(status)
    async with served(daemon) as session:
        for path in ("/healthz", "/readyz"):
            async with session.get(path) as answer:
                assert (answer.status, await answer.json()) == (200, {"ok": True, "reasons": []})
        daemon.status = replace(status, leaving=True)
        daemon.now += 1
        async with session.get("/healthz") as answer:
            assert answer.status == 200
        async with session.get("/readyz") as answer:
            assert (answer.status, await answer.json()) == (503, {"ok": False, "reasons": ["it is leaving the swarm"]})


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:9464", 200),
        ("localhost:80", 200),
        ("LOCALHOST", 200),
        ("[::1]:9464", 200),
        ("evil.example", 403),
        ("evil.example:9464", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("203.0.113.5", 403),
    ],
)
async def test_a_web_page_cannot_read_this_one_under_its_own_name(status: Status, host: str, code: int) -> None:
    async with (
        served(Daemon(status)) as session,
        session.get("/status.json", headers={"Host": host}) as answer,
    ):
        assert answer.status == code
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


async def test_nothing_can_be_changed_or_guessed(status: Status) -> None:
    async with served(Daemon(status)) as session:
        for method, path, code in (("POST", "/status.json", 405), ("GET", "/page.py", 404), ("GET", "/../web.py", 404)):
            async with session.request(method, path) as answer:
                assert answer.status == code


async def test_a_stream_begins_with_the_status_and_brings_what_happens(status: Status) -> None:
    daemon = Daemon(replace(status, leaving=True))
    async with served(daemon) as session, session.get("/events") as answer:
        assert answer.content_type == "text/event-stream"
        assert await read_event(answer) == ("status", json.loads(daemon.status.to_json()))
        assert await read_event(answer) == ("verdict", {"healthy": [], "ready": ["it is leaving the swarm"]})
        daemon.feed.publish(make_happening("line\nbreak"))
        kind, data = await read_event(answer)
        assert (kind, data) == (
            "happening",
            {"at_s": 1.0, "severity": "warning", "kind": "peer_lost", "text": "line\nbreak"},
        )
        assert (await read_event(answer))[0] == "status", "and soon after, the status that contains it"


async def test_streams_are_bounded(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CLIENTS_MAX", 2)
    assert CLIENTS_MAX < CONNECTIONS_MAX, "streams leave room for scrapes"
    async with served(Daemon(status)) as session, session.get("/events") as one, session.get("/events") as other:
        async with session.get("/events") as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"]
        assert (one.status, other.status) == (200, 200)


async def test_a_reader_that_does_not_read_is_dropped(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "WRITE_TIMEOUT_S", 0.05)
    daemon = Daemon(status)
    server = daemon.make_server()
    port = await server.start()
    _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await daemon.feed.reading.wait()
    # More than all the socket buffers of a loopback connection hold.
    daemon.feed.publish(*(make_happening("x" * 400_000) for _ in range(100)))
    async with asyncio.timeout(PATIENCE_S):
        await daemon.feed.left.wait()
    writer.close()
    await server.stop()


async def test_connections_are_bounded(status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CONNECTIONS_MAX", 2)
    server = Daemon(status).make_server()
    port = await server.start()
    held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    reader, one_too_many = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            assert await reader.read() == b"", "hung up on without a word"
    held[0][1].write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await held[0][0].readline()).startswith(b"HTTP/1.1 200"), "those that were there are still served"
    for _, writer in [*held, (reader, one_too_many)]:
        writer.close()
    await server.stop()


async def test_stopping_ends_open_streams(status: Status) -> None:
    daemon = Daemon(status)
    server = daemon.make_server()
    port = await server.start()
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/events") as answer:
        await read_event(answer)
        await server.stop()
        assert daemon.feed.left.is_set()
        with pytest.raises(aiohttp.ClientError):
            async with session.get(f"http://127.0.0.1:{port}/healthz"):
                pass


async def test_a_taken_port_is_told_with_the_way_out(status: Status) -> None:
    first = Daemon(status).make_server()
    port = await first.start()
    second = Daemon(status).make_server(port)
    with pytest.raises(PortTakenError) as caught:
        await second.start()
    assert str(port) in caught.value.problem
    assert "--web-port" in caught.value.fix
    await first.stop()
    third = Daemon(status).make_server(port)
    assert await third.start() == port, "a stopped server leaves its port free"
    await third.stop()


async def test_an_address_of_another_machine_cannot_be_listened_on(status: Status) -> None:
    daemon = Daemon(status)
    sources = WebSources(status=daemon.make_status, metrics=daemon.render, feed=daemon.feed)
    with pytest.raises(ConfigError, match="cannot be listened on"):
        await WebServer("203.0.113.77", 0, sources).start()
