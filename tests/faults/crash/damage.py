"""Files with something in them, and what can be read from them: whole, or damaged.

Each file is there in two states: closed, all of it in the file, and as a kill leaves it, the
newest commits in the WAL. ``read`` opens it with the real code and reads all there is; what it
returns is compared with what the undamaged file gave.
"""

import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Literal

from molva._base.clock import ManualClock
from molva.messaging import (
    Action,
    Message,
    MessagingError,
    open_queue,
    open_subscription,
    open_topic,
)
from molva.ratings.campaign import Campaign
from molva.ratings.catalog import CatalogError, open_catalog
from molva.ratings.ledger import LedgerError, open_ledger
from molva.ratings.rating import Change, Comment, Exclusion, Rating, Retraction, Submission

__all__ = ["ERRORS", "KINDS", "Content", "flips", "make", "read", "truncations"]

Kind = Literal["queue", "ledger", "catalog"]
KINDS: Final[tuple[Kind, ...]] = ("queue", "ledger", "catalog")
ERRORS: Final = (MessagingError, LedgerError, CatalogError)

# What was read: named parts, each a list of lines or one value.
Content = dict[str, object]

_PAGE: Final = 4_096
_FRAME: Final = _PAGE + 24
_MESSAGES: Final = 40
_RATINGS: Final = 60


async def make(kind: Kind, folder: Path, killed: Path) -> None:
    """Fill a file in ``folder`` and close it; leave in ``killed`` what a kill would have."""
    file = folder / f"{kind}.db"
    copy = {"queue": _make_queue, "ledger": _make_ledger, "catalog": _make_catalog}[kind]
    await copy(file, lambda: _copy(folder, killed))


def _copy(folder: Path, to: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".db-shm":
            shutil.copy(file, to / file.name)


async def _make_queue(file: Path, copy: Callable[[], None]) -> None:
    clock = ManualClock()
    topic_url = f"sqlite://{file}?topic=t&lanes=4&commit=loop"
    async with (
        await open_topic(topic_url, clock=clock) as topic,
        await open_subscription(f"{topic_url}&subscription=s", clock=clock) as subscription,
        await open_queue(f"sqlite://{file}?queue=q&commit=loop", clock=clock) as queue,
    ):
        messages = [_message(number) for number in range(_MESSAGES)]
        await topic.send_many(messages[: _MESSAGES // 2])
        found = await subscription.receive(10, wait=0.0)
        await subscription.settle([(d, Action.ACK) for d in found[:8]])
        await subscription.settle([(d, Action.REJECT) for d in found[8:]], reason="poison")
        await queue.send_many(messages)
        for delivery in await queue.receive(3, wait=0.0):
            await delivery.reject("poison")
        await clock.pass_time(1.0)  # watermarks are written
        await topic.send_many(messages[_MESSAGES // 2 :])
        copy()


def _message(number: int) -> Message:
    body = b"%d " % number * (400 if number % 13 == 0 else 5)  # some fill a page and more
    headers = {"kind": "x" * (number % 3)} if number % 3 else {}
    return Message(body, number.to_bytes(16, "big"), key=f"k{number % 5}", headers=headers)


async def _make_ledger(file: Path, copy: Callable[[], None]) -> None:
    ledger = await open_ledger(f"sqlite://{file}?commit=loop")
    ratings = [
        Submission(
            _id(n), Rating("default", n, n % 11, f"i{n % 3}", "well" if n % 9 == 0 else None)
        )
        for n in range(_RATINGS)
    ]
    await ledger.apply(ratings[:30], applied_at_us=1)
    await ledger.apply(ratings[30:], applied_at_us=2)
    corrections = [
        Submission(_id(100), Change("default", 1, _id(7), 10)),
        Submission(_id(101), Retraction("default", 1, _id(20))),
        Submission(_id(102), Exclusion("default", 1, _id(33), "spam")),
        Submission(_id(103), Comment("default", 1, _id(5), "hm")),
    ]
    for correction in corrections:
        await ledger.apply([correction], applied_at_us=3)
    copy()
    await ledger.close()


def _id(number: int) -> bytes:
    return number.to_bytes(16, "big")


async def _make_catalog(file: Path, copy: Callable[[], None]) -> None:
    catalog = await open_catalog(f"sqlite://{file}")
    for number in range(40):
        await catalog.put_campaign(
            Campaign(name=f"c{number}", question=f"How is number {number}? " * 4, window=number + 1)
        )
    copy()
    await catalog.close()


async def read(kind: Kind, folder: Path) -> Content:
    """Return what is in the file of a folder.

    Raises:
        Exception: One of ERRORS, where the product does what it should.
    """
    file = folder / f"{kind}.db"
    reading: dict[Kind, Callable[[Path], Awaitable[Content]]] = {
        "queue": _read_queue,
        "ledger": _read_ledger,
        "catalog": _read_catalog,
    }
    return await reading[kind](file)


async def _read_queue(file: Path) -> Content:
    clock = ManualClock()
    # Long after any lease: what is held comes again.
    await clock.pass_time(10_000.0)
    url = f"sqlite://{file}?topic=t&commit=loop&create=never"
    async with (
        await open_topic(url, clock=clock) as topic,
        await open_subscription(f"{url}&subscription=s", clock=clock) as subscription,
        await open_queue(f"sqlite://{file}?queue=q&commit=loop&create=never", clock=clock) as queue,
    ):
        stat = await topic.stat()
        waiting = []
        while found := await subscription.receive(1_000, wait=0.0):
            waiting += [_shown(d.message) for d in found]
            await subscription.settle([(d, Action.ACK) for d in found])
        queued = []
        while taken := await queue.receive(1_000, wait=0.0):
            queued += [_shown(d.message) for d in taken]
        return {
            "stored": None if stat is None else stat.stored,
            "waiting": waiting,
            "queued": queued,
            "dead": [(_shown(x.message), x.reason) for x in await subscription.dead_letters()],
            "buried": [(_shown(x.message), x.reason) for x in await queue.dead_letters()],
        }


def _shown(message: Message) -> tuple[object, ...]:
    return (message.id, message.key, tuple(message.headers.items()), message.body)


async def _read_ledger(file: Path) -> Content:
    ledger = await open_ledger(f"sqlite://{file}?commit=loop")
    try:
        content: Content = {"verify": [str(found) async for found in ledger.verify()]}
        for item in (None, "i0", "i1", "i2"):
            for n in (1, 7, 10**6):
                content[f"{item} {n}"] = str(await ledger.total("default", item=item, n=n))
        content["old"] = str(await ledger.total("default", n=5, as_of=25))
        content["entries"] = [str(entry) async for entry in ledger.entries("default")]
        return content
    finally:
        await ledger.close()


async def _read_catalog(file: Path) -> Content:
    catalog = await open_catalog(f"sqlite://{file}")
    try:
        every = await catalog.campaigns()
        one_by_one = [await catalog.campaign(f"c{number}") for number in range(40)]
        return {"all": every, "each": one_by_one}
    finally:
        await catalog.close()


def flips(name: str, size: int, *, stride: int) -> Iterator[int]:
    """Yield offsets to flip a bit at: headers byte by byte, and all else in strides.

    Headers are the first 100 bytes of a file and the first 24 of each page, the WAL's own 32
    and the 24 of each frame.
    """
    is_wal = name.endswith("-wal")
    start, unit, header = (32, _FRAME, 24) if is_wal else (0, _PAGE, 24)
    # SQLite guards each frame by one checksum: which byte of it is flipped makes no difference.
    wanted = set(range(0, size, 3 * stride if is_wal else stride)) | set(
        range(min(size, 32 if is_wal else 100))
    )
    for page in range(start, size, unit):
        wanted |= set(range(page, min(page + header, size), 1 if page < 3 * unit else 11))
    yield from sorted(wanted)


def truncations(name: str, size: int) -> Iterator[int]:
    """Yield sizes to cut to: every boundary of a page or frame, a little off, and odd ones."""
    start, unit = (32, _FRAME) if name.endswith("-wal") else (0, _PAGE)
    wanted = {1, 16, 31, 33, 99, 100, 511, 512, size - 1}
    for boundary in range(start, size, unit):
        wanted |= {boundary, boundary + 1, boundary + 24, boundary + unit // 2}
    yield from sorted(length for length in wanted if 0 < length < size)
