"""Waiting for whichever comes first."""

import asyncio
from collections.abc import Coroutine

__all__ = ["first_of"]


async def first_of(*waits: Coroutine[object, object, object]) -> None:
    """Wait until the first of several waits is over; give up the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
