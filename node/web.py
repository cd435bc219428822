"""The local web port: metrics, health, status, events and the live page. It reads and changes nothing.

    /             the live page            /metrics      Prometheus text
    /status.json  one Status               /healthz      200 or 503 with reasons: does the daemon work
    /events       server-sent events       /readyz       200 or 503 with reasons: can it take part now
    /certificates?first=N   certificates from round N on, a bounded number: for `shoal checkout` and `verify`
    /checkpoints?after=N    the trail over dropped certificates, behind round N, a bounded number
    /ledger?after=N         a page of the ledger's batches after that position: for `shoal ledger`

What answers come from are callables; nothing here knows the daemon.

Invariants: connections and event streams are bounded, and however often somebody asks, a Status is built and the
metrics are rendered at most once in their CACHE_S; other peers' addresses are shown to this machine only; on a loopback
address only loopback names are answered, so that no web page can read this one under a name of its own (DNS rebinding).
"""

import asyncio
import errno
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from aiohttp import web

from shoal.node.happenings import Happening, HappeningFeed, Reader
from shoal.node.metrics import CONTENT_TYPE
from shoal.node.status import Status, Verdict, judge_health, judge_readiness
from shoal.protocol.errors import ConfigError

STATIC = Path(__file__).parent / "static"
METRICS_CACHE_S = 1.0
STATUS_CACHE_S = 0.25
STATUS_PERIOD_S = 1.0
STATUS_SOON_S = 0.25
CLIENTS_MAX = 16
CONNECTIONS_MAX = 64
WRITE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 1.0
ROUND_DIGITS_MAX = 18

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PortTakenError(ConfigError):
    """Another program listens on the port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSources:
    """Where the answers come from. The callables return at once; they are called on the server's event loop."""

    status: Callable[[], Status]
    metrics: Callable[[], bytes]
    feed: HappeningFeed
    certificates: Callable[[int], Awaitable[bytes]] | None = None  # a bounded page of the log, from a round on
    checkpoints: Callable[[int], Awaitable[bytes]] | None = None  # a bounded page of the trail, behind a round
    ledger: Callable[[int], Awaitable[bytes]] | None = None  # a bounded page of batches, after a position


class WebPort:
    """Answers GET requests by routes. `start` it on one loop, and `stop` it there."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Handler]) -> None:
        self._host = host
        self._port = port
        self._is_local = ipaddress.ip_address(host).is_loopback
        self._streams: set[asyncio.Task[object]] = set()
        self._server: asyncio.Server | None = None
        app = web.Application(middlewares=[self._check])
        app.on_response_prepare.append(_add_headers)
        app.add_routes([web.get(path, handler, allow_head=path != "/events") for path, handler in routes.items()])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_TIMEOUT_S)

    async def start(self) -> int:
        """Listen; returns the port. Raises PortTakenError, or ConfigError where the address cannot be listened on."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._make_connection, self._host, self._port)
        except OSError as error:
            await self._runner.cleanup()
            raise _explain(error, self._host, self._port) from error
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        """End every stream and connection within STOP_TIMEOUT_S."""
        if self._server is not None:
            self._server.close()
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        await self._runner.cleanup()

    def _make_connection(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        return _Refusal() if len(server.connections) >= CONNECTIONS_MAX else server()

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._is_local and not _is_loopback_name(_host_name(request.headers.get("Host"))):
            raise web.HTTPForbidden(text="This port answers to 127.0.0.1, [::1] and localhost only.\n")
        return await handler(request)


class WebServer(WebPort):
    """The port of a peer. The sources live on the loop that it is started on."""

    def __init__(self, host: str, port: int, sources: WebSources, clock: Callable[[], float] = time.monotonic) -> None:
        self._feed = sources.feed
        self._snapshot = _Cache(lambda: _Snapshot(sources.status()), STATUS_CACHE_S, clock)
        self._metrics = _Cache(sources.metrics, METRICS_CACHE_S, clock)
        self._certificates = sources.certificates
        self._checkpoints = sources.checkpoints
        self._ledger = sources.ledger
        self._reading = asyncio.Lock()  # of the disk, for one asker at a time
        routes: dict[str, Handler] = dict.fromkeys(_PAGE, self._serve_page)
        routes["/metrics"] = self._serve_metrics
        routes["/status.json"] = self._serve_status
        routes["/healthz"] = self._serve_health
        routes["/readyz"] = self._serve_readiness
        routes["/events"] = self._serve_events
        routes["/certificates"] = self._serve_certificates
        routes["/checkpoints"] = self._serve_checkpoints
        routes["/ledger"] = self._serve_ledger
        self._files = {path: ((STATIC / name).read_bytes(), kind) for path, (name, kind) in _PAGE.items()}
        super().__init__(host, port, routes)

    def status_json(self, remote: str | None) -> str:
        """What a reader at this IP address is told."""
        snapshot = self._snapshot.get()
        return snapshot.whole_json if remote is not None and _is_loopback_name(remote) else snapshot.guest_json

    async def _serve_page(self, request: web.Request) -> web.Response:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.get(), headers={"Content-Type": CONTENT_TYPE})

    async def _serve_status(self, request: web.Request) -> web.Response:
        return web.Response(text=self.status_json(request.remote), content_type="application/json")

    async def _serve_health(self, request: web.Request) -> web.Response:
        return answer_verdict(judge_health(self._snapshot.get().status))

    async def _serve_readiness(self, request: web.Request) -> web.Response:
        return answer_verdict(judge_readiness(self._snapshot.get().status))

    async def _serve_certificates(self, request: web.Request) -> web.Response:
        return await self._serve_page_of(self._certificates, request, "first")

    async def _serve_checkpoints(self, request: web.Request) -> web.Response:
        return await self._serve_page_of(self._checkpoints, request, "after")

    async def _serve_ledger(self, request: web.Request) -> web.Response:
        return await self._serve_page_of(self._ledger, request, "after")

    async def _serve_page_of(
        self, source: Callable[[int], Awaitable[bytes]] | None, request: web.Request, name: str
    ) -> web.Response:
        place = request.query.get(name, "")
        if source is None or not (place.isascii() and place.isdigit() and len(place) <= ROUND_DIGITS_MAX):
            raise web.HTTPNotFound(text=f"Ask for {request.path}?{name}=NUMBER.\n")
        async with self._reading:
            return web.Response(body=await source(int(place)), content_type="application/octet-stream")

    async def _serve_events(self, request: web.Request) -> web.StreamResponse:
        if len(self._streams) >= CLIENTS_MAX:
            raise web.HTTPServiceUnavailable(text="Too many event streams.\n", headers={"Retry-After": "5"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            await response.prepare(request)
            await self._stream(request, response)
        except ConnectionError:
            # The reader went away, or reads too slowly: both end the stream, and EventSource begins another.
            pass
        finally:
            self._streams.discard(task)
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        status_due_s = loop.time()
        with self._feed.read() as reader:
            while True:
                happening = await _next_before(reader, status_due_s) if loop.time() < status_due_s else None
                if happening is not None:
                    await _write(response, "happening", json.dumps(asdict(happening)))
                    # Soon, because the page draws the happening from the next status; not at once, for more may follow.
                    status_due_s = min(status_due_s, loop.time() + STATUS_SOON_S)
                    continue
                await _write(response, "status", self.status_json(request.remote))
                await _write(response, "verdict", self._snapshot.get().verdicts_json)
                status_due_s = loop.time() + STATUS_PERIOD_S


class _Cache(Generic[T]):
    """What a source said at most `age_s` ago."""

    def __init__(self, source: Callable[[], T], age_s: float, clock: Callable[[], float]) -> None:
        self._source = source
        self._age_s = age_s
        self._clock = clock
        self._made: tuple[float, T] | None = None

    def get(self) -> T:
        now = self._clock()
        if self._made is None or now - self._made[0] >= self._age_s:
            self._made = now, self._source()
        return self._made[1]


class _Snapshot:
    """One Status, and its texts as they are asked for."""

    def __init__(self, status: Status) -> None:
        self.status = status

    @cached_property
    def verdicts_json(self) -> str:
        verdicts = {"healthy": judge_health(self.status), "ready": judge_readiness(self.status)}
        return json.dumps({name: verdict.reasons for name, verdict in verdicts.items()})

    @cached_property
    def whole_json(self) -> str:
        return self.status.to_json()

    @cached_property
    def guest_json(self) -> str:
        return replace(self.status, peers=tuple(replace(row, address="") for row in self.status.peers)).to_json()


class _Refusal(asyncio.Protocol):
    """Hangs up: there are CONNECTIONS_MAX connections already."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def answer_verdict(verdict: Verdict) -> web.Response:
    """200, or 503 with the reasons."""
    return web.json_response({"ok": verdict.ok, "reasons": verdict.reasons}, status=200 if verdict.ok else 503)


async def _next_before(reader: Reader, due_s: float) -> Happening | None:
    try:
        async with asyncio.timeout_at(due_s):
            return await reader.next()
    except TimeoutError:
        return None


async def _write(response: web.StreamResponse, event: str, data: str) -> None:
    """One server-sent event; JSON has no line breaks. Raises ConnectionError when the reader is gone or stuck."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(f"event: {event}\ndata: {data}\n\n".encode())
    except TimeoutError as error:
        raise ConnectionError("the reader does not read") from error


def _host_name(header: str | None) -> str:
    """The name in a Host header. Without one it is no browser that asks, and the name is this machine's."""
    if header is None:
        return "localhost"
    name, _, port = header.rpartition(":")
    if not name or not port.isdigit():
        name = header
    return name.removeprefix("[").removesuffix("]")


def _is_loopback_name(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def _explain(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        fix = "stop that program, or choose another port; --web-port 0 takes any free one"
        return PortTakenError("web.port", f"{port} is taken by another program", fix)
    if error.errno == errno.EACCES:
        return ConfigError("web.port", f"{port} may not be used by this user", "choose a port above 1023")
    fix = "use 127.0.0.1, or an address of this machine"
    return ConfigError("web.host", f"{host} cannot be listened on: {error.strerror}", fix)
