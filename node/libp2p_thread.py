"""The one bridge between the daemon's asyncio loop and the trio run that py-libp2p lives in.

The trio run has its own thread, so that neither loop can hold up the other beyond the interpreter lock, and several
nodes fit in one process. The thread is a daemon thread: it never keeps the process alive.

Invariants: deliveries to asyncio run in the order in which trio made them; a call never outlives the run (it ends with
ControlStopped); an error of the trio run is reported once, never lost.
"""

import asyncio
import collections
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar, TypeVarTuple

import trio

from shoal.node.control import ControlStopped
from shoal.protocol.errors import ShoalError

R = TypeVar("R")
T = TypeVar("T")
Args = TypeVarTuple("Args")


class Handover:
    """Something that asyncio handed to trio and waits for. Trio calls it once, with the error if there was one."""

    def __init__(self, deliver: Callable[..., None], future: "asyncio.Future[None]") -> None:
        self._deliver = deliver
        self._future = future

    async def wait(self) -> None:
        """Asyncio side: return when trio is done with it; raises what trio reports."""
        await self._future

    @property
    def abandoned(self) -> bool:
        """Trio side: whether nobody waits any more."""
        return self._future.done()

    def __call__(self, error: BaseException | None) -> None:
        self._deliver(_resolve, self._future, None, error)


class TrioThread(Generic[R]):
    """A trio run with a resource of type R in it. Lives once: start, use, stop.

    Methods marked "asyncio side" belong to the loop that called `start`, those marked "trio side" to the run.
    """

    def __init__(self, name: str, on_crashed: Callable[[BaseException], None]) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._on_crashed = on_crashed
        self._open: Callable[[], AbstractAsyncContextManager[R]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[R] | None = None
        self._ended: asyncio.Event = asyncio.Event()
        self._calls: set[asyncio.Future[Any]] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._stopping: trio.Event | None = None
        self._deliveries: collections.deque[tuple[Callable[..., object], tuple[Any, ...]]] = collections.deque()
        self._drain_scheduled = False
        self._stop_requested = False

    # -- asyncio side

    async def start(self, open_resource: Callable[[], AbstractAsyncContextManager[R]]) -> R:
        """Start the run and enter the resource in it; what entering raises is raised here, and the run is over."""
        assert self._loop is None, "a thread starts once"
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._open = open_resource
        self._thread.start()
        return await asyncio.shield(self._ready)

    async def stop(self, timeout_s: float) -> bool:
        """Leave the resource and end the thread; whether that was done in time. A thread that hangs is abandoned."""
        if self._loop is None:
            return True
        self._stop_requested = True
        if self._token is not None and self._stopping is not None:
            self._post_to_trio(self._stopping.set)
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            self._fail_calls()
            return False
        # The run is over; only the last lines of the thread function are left.
        self._thread.join()
        return True

    async def call(self, async_fn: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Run `async_fn(*args)` in trio and return its result; cancelling the caller cancels it there."""
        loop, scope = self._running_loop(), trio.CancelScope()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        async def run() -> None:
            error: BaseException | None = ControlStopped("the control plane stopped")
            result: Any = None
            try:
                with scope:
                    result, error = await async_fn(*args), None
            except ShoalError as raised:
                error = raised
            finally:
                self.deliver(_resolve, future, result, error)

        try:
            self._post_to_trio(self._start_soon, run)
            return await future
        except asyncio.CancelledError:
            self._post_to_trio(scope.cancel)
            raise

    def post(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        """Run `fn(*args)` in trio soon, in the order of the posts."""
        self._running_loop()
        self._post_to_trio(fn, *args)

    def open_handover(self) -> Handover:
        """Something to `post` along with a job and to wait for."""
        future: asyncio.Future[None] = self._running_loop().create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return Handover(self.deliver, future)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._token is None or self._ended.is_set():
            raise ControlStopped("the control plane is not running")
        return self._loop

    def _post_to_trio(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        assert self._token is not None
        try:
            self._token.run_sync_soon(fn, *args)
        except trio.RunFinishedError:
            # `_end` is on its way to this loop and fails whoever waits.
            return

    def _fail_calls(self) -> None:
        for future in tuple(self._calls):
            _resolve(future, None, ControlStopped("the control plane stopped"))

    def _drain(self) -> None:
        self._drain_scheduled = False
        while self._deliveries:
            fn, args = self._deliveries.popleft()
            fn(*args)

    def _end(self, error: BaseException | None) -> None:
        self._ended.set()
        self._fail_calls()
        assert self._ready is not None
        if not self._ready.done():
            self._ready.set_exception(error or ControlStopped("the control plane stopped"))
        elif error is not None:
            self._on_crashed(error)

    # -- trio side

    def deliver(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        """Run `fn(*args)` on the asyncio loop soon, after everything that was delivered before."""
        self._deliveries.append((fn, args))
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._wake_loop(self._drain)

    async def ask(self, async_fn: Callable[[*Args], Awaitable[T]], *args: *Args) -> T:
        """Run `async_fn(*args)` on the asyncio loop, after everything that was delivered before.

        Raises its ShoalErrors, and ControlStopped when it failed otherwise.
        """
        done, outcome = trio.Event(), list[asyncio.Future[T]]()

        def start() -> None:
            task = asyncio.ensure_future(async_fn(*args))
            outcome.append(task)
            task.add_done_callback(settle)

        def settle(task: "asyncio.Future[T]") -> None:
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, ShoalError):
                # A handler's own mistake; over there it would look like a peer's.
                task.get_loop().call_exception_handler({"message": f"{async_fn} failed", "exception": error})
            self._post_to_trio(done.set)

        self.deliver(start)
        try:
            await done.wait()
        except trio.Cancelled:
            self.deliver(lambda: outcome[0].cancel())
            raise
        if outcome[0].cancelled() or not isinstance(outcome[0].exception(), ShoalError | None):
            raise ControlStopped("the handler failed")
        return outcome[0].result()

    async def flush(self) -> None:
        """Return when everything that was delivered before has run."""
        done = trio.Event()
        self.deliver(self._post_to_trio, done.set)
        await done.wait()

    def _start_soon(self, run: Callable[[], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(run)

    def _wake_loop(self, fn: Callable[[*Args], object], *args: *Args) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:
            # The loop is closed: nobody is left to be told.
            return

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as raised:  # noqa: BLE001
            # The thread's outermost frame: what is not reported from here is lost.
            error = _innermost(raised)
        self._wake_loop(self._drain)
        self._wake_loop(self._end, error)

    async def _main(self) -> None:
        assert self._open is not None and self._ready is not None
        self._stopping = trio.Event()
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            async with self._open() as resource:
                self.deliver(_resolve, self._ready, resource, None)
                if not self._stop_requested:
                    await self._stopping.wait()
            self._nursery.cancel_scope.cancel()


def _resolve(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _innermost(error: BaseException) -> BaseException:
    # Nurseries wrap what goes through them in groups; a group of one says no more than its member.
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
