"""The event loop behind ``molva.messaging.sync``: one thread of it for each process.

Any number of threads call in; each waits for its own answer. The thread starts with the first
call and is a daemon: it ends with the process.

After a fork the child has the memory of the thread and not the thread. So every object knows
the process that it was opened in, and says so elsewhere instead of waiting for ever; what is
opened in the child gets a loop of the child's own.
"""

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, Final, Generic, TypeVar, final

from molva.messaging.errors import ForkedError

__all__ = ["Portal", "portal"]

T = TypeVar("T")


@final
class Portal:
    """A loop in a thread of its own."""

    def __init__(self) -> None:
        self._pid: Final = os.getpid()
        self._loop: Final = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="molva-messaging", daemon=True).start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop; return or raise what it does.

        Interrupted while it waits (Ctrl-C), it cancels the coroutine, which loses nothing.

        Raises:
            ForkedError: This process is a fork of the one that opened it.
            RuntimeError: Called on an event loop, which it would block.
        """
        if os.getpid() != self._pid:
            work.close()
            raise ForkedError(
                f"it was opened in process {self._pid} and is used in its fork {os.getpid()}; "
                "open it anew after the fork"
            )
        if asyncio._get_running_loop() is not None:
            work.close()
            raise RuntimeError(
                "a blocking call of molva.messaging.sync was made on an event loop, which it "
                "would stop; use the class of the same name in molva.messaging"
            )
        call = _Call(work, self._loop)
        self._loop.call_soon_threadsafe(call.begin)
        try:
            return call.wait()
        except BaseException:
            # Ours or the coroutine's: cancelling one that has ended does nothing.
            self._loop.call_soon_threadsafe(call.cancel)
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()


@final
class _Call(Generic[T]):
    """A coroutine on the loop, and a thread that waits for it.

    ``asyncio.run_coroutine_threadsafe`` does the same with a future for each side and callbacks
    that carry results and cancelling across; those cost more than the rest of a call.
    """

    __slots__ = ("_done", "_error", "_loop", "_result", "_task", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        # A bare lock, which is let go of when there is an answer.
        self._done = threading.Lock()
        self._done.acquire()

    def begin(self) -> None:
        """Start; on the loop, in the context of the thread that waits."""
        self._task = self._loop.create_task(self._run())

    def cancel(self) -> None:
        """Cancel it; on the loop, after ``begin``."""
        if self._task is not None:
            self._task.cancel()

    def wait(self) -> T:
        """Return or raise what the coroutine does; in the thread."""
        self._done.acquire()
        if self._error is None:
            return self._result
        try:
            if isinstance(self._error, asyncio.CancelledError):
                raise CancelledError from self._error  # the one that threads know
            raise self._error
        finally:
            self._error = None  # or it would hold this frame, and the frame holds it

    async def _run(self) -> None:
        try:
            self._result = await self._work
        except BaseException as error:  # noqa: BLE001 - it is the waiting thread's
            self._error = error
        finally:
            self._done.release()


_lock = threading.Lock()
# By process: a fork starts without.
_portals: Final[dict[int, Portal]] = {}


def portal() -> Portal:
    """Return this process's portal, started with the first call."""
    pid = os.getpid()
    with _lock:
        found = _portals.get(pid)
        if found is None:
            _portals.clear()
            found = _portals[pid] = Portal()
        return found


def _forget_lock() -> None:
    global _lock
    # Another thread may have held it at the moment of the fork, and is not here to let go.
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)
