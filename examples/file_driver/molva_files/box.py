"""A box: what waits in one queue or subscription, as files; and what is made of boxes.

A file's name says all that changes about its message, so that a rename changes it at once:

    ready/PLACE.VISIBLE.ATTEMPT        held/PLACE.UNTIL.ATTEMPT.TOKEN        dead/PLACE

PLACE is when it was stored, a count, and its id: sorted, that is the order. The file holds
a line of JSON (id, key, headers ...), then the body.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from molva.messaging import (
    DeadLetter,
    InUseError,
    Message,
    Peeked,
    QueueStat,
    SubscriptionStat,
    TopicStat,
)
from molva.messaging.driver import (
    Action,
    Capabilities,
    Clock,
    Outcome,
    RawDelivery,
    Settlement,
    Token,
)

__all__ = ["Box", "FilesConsumer", "FilesQueue", "FilesTopic"]

# Seconds between two looks of a consumer that waits. An idle consumer should have a message
# within 50 ms; looking costs some 20 µs.
_LOOK: Final = 0.02
_count = itertools.count()


class Box:
    """What waits in one queue or subscription, in a folder."""

    def __init__(self, folder: Path, origin: str, clock: Clock, *, durable: bool) -> None:
        self.origin = origin
        self.clock = clock
        self.durable = durable
        self.tmp, self.ready, self.held, self.dead = (
            folder / part for part in ("tmp", "ready", "held", "dead")
        )
        for part in (self.tmp, self.held, self.dead, self.ready):
            part.mkdir(parents=True, exist_ok=True)

    def write(self, message: Message, name: str, **more: object) -> Path:
        """Write a file that nobody looks at yet, and that is not on the disk yet."""
        head = {
            "id": message.id.hex(),
            "key": message.key,
            "headers": dict(message.headers),
            "priority": message.priority,
            "ttl": message.ttl,
            **more,
        }
        path = self.tmp / name
        path.write_bytes(json.dumps(head).encode() + b"\n" + message.body)
        return path

    def place(self, message: Message) -> str:
        """Return the name under which a message of now is stored, after all before it."""
        return f"{self.clock.now_us():016x}-{next(_count):08x}-{message.id.hex()}"

    def sync(self, *paths: Path) -> None:
        """Return when these files, or the names in these folders, outlive a power cut."""
        for path in paths if self.durable else ():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def take_back(self) -> None:
        """Make ready what consumers hold whose lease has run out."""
        now = self.clock.now_us()
        for name in os.listdir(self.held):
            place, until, attempt, _ = name.split(".")
            if int(until) <= now:
                move(self.held / name, self.ready / f"{place}.{now:016}.{int(attempt) + 1}")

    def waiting(self) -> Iterator[tuple[str, int, int]]:
        """Yield place, when it is visible, and attempt of what is ready, oldest first."""
        for name in sorted(os.listdir(self.ready)):
            place, visible, attempt = name.split(".")
            yield place, int(visible), int(attempt)

    @contextlib.contextmanager
    def locked(self, how: int) -> Iterator[None]:
        """Lock the box: ``LOCK_SH`` while somebody receives, ``LOCK_EX`` to remove it."""
        folder = os.open(self.ready, os.O_RDONLY)
        try:
            fcntl.flock(folder, how | fcntl.LOCK_NB)
            yield
        finally:
            os.close(folder)


class FilesConsumer:
    """One consumer of a box."""

    def __init__(self, box: Box, lease: float, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.lease = lease
        self._box = box
        # Where what we hold lies. A token that is not here, or whose file is not there any
        # more, was settled or lost.
        self._held: dict[Token, Path] = {}
        self._closed = False

    async def receive_batch(self, limit: int, *, wait: float) -> list[RawDelivery]:
        """Take up to ``limit`` messages, oldest first."""
        deadline = self._box.clock.monotonic() + wait
        with self._box.locked(fcntl.LOCK_SH):
            while True:
                # Without an await, so that nobody can cancel it half way.
                found = [] if self._closed else self._take(limit)
                left = deadline - self._box.clock.monotonic()
                if found or left <= 0 or self._closed:
                    return found
                await self._box.clock.sleep(min(_LOOK, left))

    def _take(self, limit: int) -> list[RawDelivery]:
        box = self._box
        box.take_back()
        found: list[RawDelivery] = []
        now = box.clock.now_us()
        for place, visible, attempt in box.waiting():
            if len(found) == limit:
                break
            token = uuid.uuid4().hex
            held = box.held / f"{place}.{self._until(self.lease)}.{attempt}.{token}"
            if visible <= now and move(box.ready / f"{place}.{visible:016}.{attempt}", held):
                self._held[token] = held
                message, _ = read(held)
                found.append(RawDelivery(message, attempt, token, stored_at(place)))
        return found

    def _until(self, seconds: float) -> int:
        return self._box.clock.now_us() + int(seconds * 1e6)

    async def settle_batch(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        """Settle hand-overs."""
        done = [self._settle(settlement) for settlement in settlements]
        self._box.sync(self._box.held, self._box.ready, self._box.dead)
        return [Outcome.SETTLED if each else Outcome.LEASE_LOST for each in done]

    def _settle(self, settlement: Settlement) -> bool:
        held = self._held.pop(settlement.token, None)
        if held is None:
            return False
        place = held.name.partition(".")[0]
        if settlement.action is Action.ACK:
            return remove(held)
        if settlement.gives_back:
            ready = f"{place}.{self._until(settlement.delay):016}.{settlement.next_attempt}"
            return move(held, self._box.ready / ready)
        # Held for long enough to write why; then it is one or the other at every moment.
        ours = held.with_name(f"{place}.{self._until(60.0)}.{settlement.attempt}.burying")
        if not move(held, ours):
            return False
        message, _ = read(ours)
        why = {"reason": settlement.reason, "attempts": settlement.attempt}
        died = {"died_at_us": self._box.clock.now_us()}
        written = self._box.write(message, place, **why, **died)
        self._box.sync(written)
        written.rename(self._box.dead / place)
        return remove(ours)

    async def extend_batch(self, tokens: Sequence[Token], seconds: float) -> list[Outcome]:
        """Hold for ``seconds`` from now."""
        return [
            Outcome.EXTENDED if self._extend(token, seconds) else Outcome.LEASE_LOST
            for token in tokens
        ]

    def _extend(self, token: Token, seconds: float) -> bool:
        held = self._held.get(token)
        if held is None:
            return False
        place, _, attempt, _ = held.name.split(".")
        longer = held.with_name(f"{place}.{self._until(seconds)}.{attempt}.{token}")
        self._held[token] = longer
        return move(held, longer)

    async def flush(self) -> None:
        """Nothing waits to be written."""

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """Return dead letters, oldest first."""
        found = []
        for place in sorted(os.listdir(self._box.dead))[:limit]:
            message, head = read(self._box.dead / place)
            why = head["reason"], head["attempts"], head["died_at_us"]
            found.append(DeadLetter(message, *why, self._box.origin, stored_at(place)))
        return found

    async def replay(self, ids: Collection[bytes] | None, limit: int) -> int:
        """Make dead letters ready again, as if they had never been tried."""
        wanted = None if ids is None else {each.hex() for each in ids}
        done = 0
        for place in sorted(os.listdir(self._box.dead)):
            if done < limit and (wanted is None or place.rpartition("-")[2] in wanted):
                done += move(self._box.dead / place, self._box.ready / f"{place}.{0:016}.1")
        self._box.sync(self._box.ready, self._box.dead)
        return done

    async def purge(self, *, dead: bool) -> int:
        """Remove what waits and what is held, or the dead letters."""
        box = self._box
        folders = [box.dead] if dead else [box.ready, box.held]
        return sum(remove(path) for folder in folders for path in folder.iterdir())

    async def peek(self, limit: int) -> list[Peeked]:
        """Look at what is ready, then at what is held, then at what comes later."""
        box = self._box
        box.take_back()
        now = box.clock.now_us()
        found: list[Peeked] = []
        for place, visible, attempt in box.waiting():
            message, _ = read(box.ready / f"{place}.{visible:016}.{attempt}")
            state: Any = "ready" if visible <= now else "delayed"
            found.append(Peeked(message, state, attempt - 1, stored_at(place)))
        for name in sorted(os.listdir(box.held)):
            place, _, held_attempt, _ = name.split(".")
            message, _ = read(box.held / name)
            found.append(Peeked(message, "held", int(held_attempt), stored_at(place)))
        rank = ("ready", "held", "delayed")
        return sorted(found, key=lambda peeked: rank.index(peeked.state))[:limit]

    async def stat(self) -> SubscriptionStat | None:
        """Nobody counts a topic: see its capabilities."""
        return None

    async def close(self) -> None:
        """Give back what is held, and end a receive that waits."""
        self._closed = True
        await self.settle_batch(
            [
                Settlement(token, Action.RETURN, attempt=int(path.name.split(".")[2]))
                for token, path in self._held.items()
            ]
        )


class FilesQueue(FilesConsumer):
    """Both ends of a queue."""

    capacity = None

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order."""
        return send(self._box, [self._box], messages)

    async def stat(self) -> QueueStat:  # type: ignore[override]
        """Count files."""
        box = self._box
        box.take_back()
        now = box.clock.now_us()
        waiting = list(box.waiting())
        ready = sum(visible <= now for _, visible, _ in waiting)
        held = os.listdir(box.held)
        oldest = min((stored_at(name) for name in [*held, *(w[0] for w in waiting)]), default=None)
        return QueueStat(
            pending=len(waiting) + len(held),
            ready=ready,
            held=len(held),
            delayed=len(waiting) - ready,
            dead=len(os.listdir(box.dead)),
            dropped=0,
            oldest_seconds=None if oldest is None else (now - oldest) / 1e6,
        )


class FilesTopic:
    """The sending side of a topic: a folder with a box for each subscription."""

    capacity = None

    def __init__(self, folder: Path, name: str, clock: Clock, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self._folder, self._name, self._clock = folder, name, clock

    def _box(self, folder: Path) -> Box:
        origin = f"topic {self._name}, subscription {unquote(folder.name)}"
        durable = "power" in self.capabilities.survives
        return Box(folder, origin, self._clock, durable=durable)

    async def send_batch(self, messages: Sequence[Message]) -> list[Outcome]:
        """Store messages in their order, for each subscription that there is."""
        boxes = [self._box(folder) for folder in self._folder.iterdir()]
        return send(boxes[0], boxes, messages) if boxes else [Outcome.STORED] * len(messages)

    async def stat(self) -> TopicStat | None:
        """Nobody counts a topic: see its capabilities."""
        return None

    async def dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        """Return dead letters of a subscription, oldest first."""
        folder = self._folder / quote(subscription, safe="")
        if not folder.exists():
            return []
        consumer = FilesConsumer(self._box(folder), 0.0, self.capabilities)
        return await consumer.dead_letters(limit)

    async def remove_subscription(self, subscription: str) -> bool:
        """Remove a subscription that nobody receives from now, and what waits in it."""
        folder = self._folder / quote(subscription, safe="")
        if not folder.exists():
            return False
        try:
            with self._box(folder).locked(fcntl.LOCK_EX):
                folder.rename(gone := self._folder.parent / f".{uuid.uuid4().hex}")
        except BlockingIOError:
            raise InUseError(f"{subscription!r} is being consumed; stop its consumers") from None
        await asyncio.to_thread(_remove_tree, gone)
        return True

    async def close(self) -> None:
        """Nothing is open."""


def send(first: Box, boxes: Sequence[Box], messages: Sequence[Message]) -> list[Outcome]:
    """Write each message once and link it into each box; return when all are on the disk."""
    written: list[Path] = []
    for message in messages:
        visible = first.clock.now_us() + int(message.delay * 1e6) if message.delay else 0
        written.append(first.write(message, f"{first.place(message)}.{visible:016}.1"))
    first.sync(*written)  # all that they hold, before any of them is seen
    for path in written:
        for box in boxes:
            os.link(path, box.ready / path.name)
        path.unlink()
    first.sync(*(box.ready for box in boxes))
    return [Outcome.STORED] * len(messages)


def read(path: Path) -> tuple[Message, dict[str, Any]]:
    """Return the message in a file, and what else its head says."""
    head, _, body = path.read_bytes().partition(b"\n")
    fields: dict[str, Any] = json.loads(head)
    known = {name: fields[name] for name in ("key", "headers", "priority", "ttl")}
    return Message(body, id=bytes.fromhex(fields["id"]), **known), fields


def stored_at(place: str) -> int:
    """Return when a message was stored."""
    return int(place.partition("-")[0], 16)


def move(path: Path, to: Path) -> bool:
    """Rename a file; False where somebody else was quicker."""
    try:
        path.rename(to)
    except FileNotFoundError:
        return False
    return True


def remove(path: Path) -> bool:
    """Remove a file; False where somebody else was quicker."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _remove_tree(folder: Path) -> None:
    for part in folder.iterdir():
        for path in part.iterdir():
            remove(path)
        part.rmdir()
    folder.rmdir()
