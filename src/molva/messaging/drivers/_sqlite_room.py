"""How a sender waits for room in a full queue or topic of a SQLite file, and is told of it.

A sender that waits has a named pipe of its own, and whoever makes room, in any process,
writes to all such pipes after its commit:

    queue.db-lanes/room/<owner>.member.<slot>   locked by each sender that waits
    queue.db-lanes/room/<owner>.wake.<slot>     the pipe that it reads

They are made as those of consumers are (``_sqlite_members``), in a folder of their own, so
that consumers are not woken for room and senders not for messages. A pipe is there only
while its sender waits. So where nobody waits, making room costs one look at the folder's
time stamp, and a sender that waits costs nothing until it is woken.

Rejected: looking every so often, which costs each sender that waits a read, a write lock
and perhaps an fsync each time, and makes what was freed wait for the next look.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from molva._base.clock import Clock
from molva._base.waiting import first_of
from molva.messaging.drivers._sqlite_members import Members, lanes_folder

__all__ = ["room_folder", "wait_for_room"]

# Seconds after which a sender that waits looks for itself: one read. Whoever makes room
# wakes it; this is for what nobody saw, such as a consumer that was killed before it could.
_LOOK: Final = 1.0


def room_folder(database: Path) -> Path:
    """Return the folder of the pipes of senders that wait for room in a database."""
    return lanes_folder(database) / "room"


async def wait_for_room(
    database: Path,
    owner: str,
    has_room: Callable[[], bool],
    *,
    wait: float,
    clock: Clock,
) -> bool:
    """Wait up to ``wait`` seconds until there is room; return whether there is.

    Args:
        database: The file.
        owner: Keeps the queues and topics of one database apart.
        has_room: Reads whether a message fits now.
        wait: Seconds.
        clock: Where time comes from.
    """
    deadline = clock.monotonic() + wait
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    pipe = Members(room_folder(database), owner)
    loop.add_reader(pipe.wake_descriptor, woken.set)
    try:
        while True:
            # Forget earlier wake-ups before looking: room that is made after this look is
            # then still told when we wait.
            woken.clear()
            pipe.drain_wake()
            if has_room():
                return True
            left = deadline - clock.monotonic()
            if left <= 0:
                return False
            await first_of(clock.sleep(min(left, _LOOK)), woken.wait())
    finally:
        loop.remove_reader(pipe.wake_descriptor)
        pipe.close()
