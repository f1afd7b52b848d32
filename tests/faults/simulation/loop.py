"""An event loop without a machine below it: virtual time, several processes, one seed.

Every process of the simulated system has a line of callbacks of its own. Within a line the
order is asyncio's, first come, first served, which code may rely on. Between lines nothing is
promised, by no operating system, and there the seed decides: whose turn it is, and for how
many callbacks. When nobody has anything to do, time jumps to the next timer.

To which process a callback belongs, its context says: a task carries the context in which it
was made, and so does everything that wakes it up. A process that is killed is never run again:
its lines and timers lie where they fell, no ``finally`` runs, as SIGKILL has it. One that is paused
keeps its lines, and goes on with them later.

There is no selector, no thread, no signal here. What a program hands to a thread runs at once,
at a later moment of virtual time.
"""

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

__all__ = ["Deadlock", "Process", "SimulatedLoop", "VirtualClock"]

T = TypeVar("T")

# 2026-01-01, where the virtual wall clock begins: microseconds, UTC.
_EPOCH_US: Final = 1_767_225_600_000_000

# Callbacks that may run without time moving on. A task that spins on ``sleep(0)`` would
# otherwise hang the test run; the busiest honest moment takes a few thousand.
_MOST_AT_ONE_MOMENT: Final = 50_000

# Virtual seconds that a call handed to a thread takes, at most.
_THREAD_SECONDS: Final = 0.002

_process: Final[contextvars.ContextVar["Process"]] = contextvars.ContextVar("process")


class Deadlock(AssertionError):  # noqa: N818 - what it is called
    """Nobody can go on, and the run is not over; or everybody goes on for ever."""


@final
class Process:
    """A process of the simulated system.

    Attributes:
        name: For people.
        alive: Whether it was not killed.
        paused: Whether it stands still.
        tasks: All that it ever started; kept, so that nothing of a killed one is collected,
            which would run its ``finally`` blocks after all.
    """

    __slots__ = ("alive", "context", "name", "paused", "ready", "tasks")

    def __init__(self, name: str) -> None:
        self.name = name
        self.alive = True
        self.paused = False
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: list[asyncio.Task[Any]] = []
        self.context = contextvars.Context()
        self.context.run(_process.set, self)

    @property
    def busy(self) -> bool:
        """Whether any of its tasks is under way."""
        return any(not task.done() for task in self.tasks)


if TYPE_CHECKING:
    # Of the sixty methods that a loop can have, the code under test asks for ten.
    _Loop = Any
else:
    _Loop = asyncio.AbstractEventLoop


@final
class SimulatedLoop(_Loop):  # type: ignore[misc]
    """Runs processes on virtual time, in an order that the seed decides."""

    def __init__(self, seed: int) -> None:
        self.chance: Final = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.errors: list[str] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = 0
        self._runnable: list[Process] = []

    # Processes --------------------------------------------------------------------------

    def start(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run a coroutine as a task of a process."""
        return process.context.copy().run(self.create_task, coroutine)

    def kill(self, process: Process) -> None:
        """End a process where it stands."""
        process.alive = False
        if process in self._runnable:
            self._runnable.remove(process)

    def pause(self, process: Process) -> None:
        """Stop a process until ``resume``. Its timers fire late, as those of a real one do."""
        process.paused = True
        if process in self._runnable:
            self._runnable.remove(process)

    def resume(self, process: Process) -> None:
        """Let a paused process go on."""
        process.paused = False
        if process.alive and process.ready:
            self._runnable.append(process)

    def bury(self, process: Process) -> None:
        """Let a killed process clean up after all, when nothing it does matters any more."""
        process.alive, process.paused = True, False
        if process.ready and process not in self._runnable:
            self._runnable.append(process)
        for task in process.tasks:
            if not task.done():
                task.cancel()

    # Running ----------------------------------------------------------------------------

    def run(self, process: Process, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of a process to its end, and everybody else meanwhile.

        Raises:
            Deadlock: It can never end.
        """
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            task = self.start(process, coroutine)
            self._run_until(task.done)
            return task.result()
        finally:
            asyncio._set_running_loop(before)

    def _run_until(self, done: Callable[[], bool]) -> None:
        runnable = self._runnable
        chance = self.chance.random
        at_this_moment = 0
        while not done():
            if not runnable:
                self._jump()
                at_this_moment = 0
                continue
            process = runnable[int(chance() * len(runnable))] if len(runnable) > 1 else runnable[0]
            ready = process.ready
            # A few callbacks, mostly: an operating system gives a process more than one, and
            # sometimes no more than one.
            turn = 1 + int(chance() * 8)
            while turn and ready and process.alive and not process.paused:
                turn -= 1
                at_this_moment += 1
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._run()
            if not ready:
                runnable.remove(process)  # killed or paused, it would not be empty
            if at_this_moment > _MOST_AT_ONE_MOMENT:
                raise Deadlock(f"{process.name} spins at {self.now:.3f} s; {self._under_way()}")
            self.steps += 1

    def _jump(self) -> None:
        """Move time on to the next timer of a living process."""
        timers = self._timers
        while timers:
            when, _, timer = heapq.heappop(timers)
            if timer._cancelled:
                continue
            self.now = max(self.now, when)
            self._add(timer)
            # Those of the same moment become ready together.
            while timers and timers[0][0] <= self.now:
                _, _, timer = heapq.heappop(timers)
                if not timer._cancelled:
                    self._add(timer)
            if self._runnable:
                return
        raise Deadlock(f"nobody can go on at {self.now:.3f} s; {self._under_way()}")

    def _under_way(self) -> str:
        return f"errors so far: {self.errors}"

    def _add(self, handle: asyncio.Handle) -> None:
        """File a callback under its process, whether or not that can run."""
        process: Process = handle._context[_process]  # type: ignore[attr-defined]
        # Not twice: whose turn it is now is there already, with an empty line.
        if (
            not process.ready
            and process.alive
            and not process.paused
            and process not in self._runnable
        ):
            self._runnable.append(process)
        process.ready.append(handle)

    # What asyncio asks of a loop --------------------------------------------------------

    def time(self) -> float:
        """Return the virtual time."""
        return self.now

    def call_soon(
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback in the next turns of its process."""
        handle = asyncio.Handle(callback, args, self, context)
        self._add(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback in ``delay`` virtual seconds."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback at a virtual moment."""
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._numbers += 1
        heapq.heappush(self._timers, (when, self._numbers, timer))
        return timer

    def create_future(self) -> "asyncio.Future[Any]":
        """Return a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> "asyncio.Task[T]":
        """Return a task; it belongs to the process whose code makes it."""
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        _process.get().tasks.append(task)
        return task

    def run_in_executor(
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        """Run a function as if in a thread: in one piece, some time from now."""
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - it is the future's
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_later(self.chance.random() * _THREAD_SECONDS, work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody caught: a run with any of it has failed."""
        self.errors.append(f"{context.get('message')}: {context.get('exception')!r}")

    def get_debug(self) -> bool:
        """Tell that this is no debug mode, which would read the real clock."""
        return False

    def is_running(self) -> bool:
        """Tell that it runs."""
        return True

    def is_closed(self) -> bool:
        """Tell that it can be used."""
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Nothing to do: cancelled timers are passed over when their time comes."""


@final
class VirtualClock:
    """The loop's time, as one process sees it."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def now_us(self) -> int:
        """Return the wall clock: whole microseconds since 1970-01-01 UTC."""
        return _EPOCH_US + round(self._loop.now * 1_000_000)

    def monotonic(self) -> float:
        """Return the virtual seconds passed so far."""
        return self._loop.now

    async def sleep(self, seconds: float) -> None:
        """Wait ``seconds`` of virtual time."""
        await asyncio.sleep(seconds)
