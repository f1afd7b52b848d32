"""Waiting for whichever comes first."""

import asyncio
from collections.abc import Coroutine

__all__ = ["first_of", "is_being_cancelled"]


def is_being_cancelled() -> bool:
    """Return whether somebody cancels this task.

    Otherwise a CancelledError is the end of something else that was waited for: some libraries
    end what waits for a lost connection so. Taken for a cancellation it would end this task, too.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def first_of(*waits: Coroutine[object, object, object]) -> None:
    """Wait until the first of several waits is over; give up the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
