"""What the long-running commands share: signals, the loop, the parent that must live."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final

from molva._base.redaction import redact

__all__ = ["PARENT_PIPE", "READY_PIPE", "run_until_signal", "set_up_logging", "tell_parent_ready"]

# Names the reading end of a pipe whose other end the parent holds. It reads as ended when
# the parent has gone, however it went.
PARENT_PIPE: Final = "MOLVA_PARENT_PIPE"

# Names the writing end of a pipe by which a child tells its parent that it answers.
READY_PIPE: Final = "MOLVA_READY_PIPE"

_STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


def set_up_logging() -> None:
    """Log to stderr, one line an event, without secrets."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("_granian").setLevel(logging.WARNING)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # One event is one line, whatever was in it.
        return redact(super().format(record)).replace("\n", "\n    ")


def run_until_signal(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run ``main`` with an event that SIGTERM, SIGINT or the parent's end sets."""

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _STOPPING:
            loop.add_signal_handler(number, stop.set)
        pipe = os.environ.get(PARENT_PIPE)

        def end_with_parent(pipe: int) -> None:
            # A pipe that has ended can always be read: one look is enough.
            loop.remove_reader(pipe)
            stop.set()

        if pipe is not None:
            loop.add_reader(int(pipe), end_with_parent, int(pipe))
        try:
            await main(stop)
        finally:
            if pipe is not None:
                loop.remove_reader(int(pipe))

    before = {number: signal.getsignal(number) for number in _STOPPING}
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(supervised())
    finally:
        # uvloop leaves its handlers behind: what runs after it could not be interrupted. Not
        # earlier, since a second signal must not end what the first lets finish.
        for number, handler in before.items():
            signal.signal(number, handler)


def tell_parent_ready() -> None:
    """Tell the parent, if there is one, that this process answers."""
    pipe = os.environ.pop(READY_PIPE, None)
    if pipe is not None:
        # The parent reads once, from the first process that says so: after many the pipe is full.
        os.set_blocking(int(pipe), False)
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(int(pipe), b"\0")
        os.close(int(pipe))


def _loop_factory() -> "Callable[[], asyncio.AbstractEventLoop] | None":
    try:
        import uvloop
    except ModuleNotFoundError:
        return None
    return uvloop.new_event_loop
