"""One process of a queue's round: a producer or a consumer, which is killed and paused at will.

    python queue_actor.py produce URL LOG NAME
    python queue_actor.py consume URL LOG NAME [MUTANT]

What it does stands in its log, one line an event, each written in one call: after a kill the
log ends with a whole line. Times are of the monotonic clock, which all processes share.

    try ID T            about to send            sent ID T       confirmed
    begin ID ATTEMPT T  handed over              bad ID T        not what was sent
    done ID ATTEMPT T   its effect has happened
    ack | nack | reject ID ATTEMPT T             and the broker confirmed it
    raise ID ATTEMPT T  the handler raises
    late ID ATTEMPT T                            LeaseLostError: another consumer has it

What a consumer does with a message depends on its number alone (``fate``), so that the judge
knows what must become of it.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import sys
import time
from pathlib import Path
from typing import Final

from molva.messaging import (
    Delivery,
    LeaseLostError,
    Message,
    SendManyError,
    UnavailableError,
    open_queue,
)

__all__ = ["MAX_ATTEMPTS", "REPAIRED", "body_of", "fate", "id_of"]

MAX_ATTEMPTS: Final = 4
# Seconds that work takes: some of it longer than a lease, which is then extended.
_WORK: Final = (0.0, 0.08)
_LONG_WORK: Final = (0.3, 1.5)
# A file of this name beside the log: whoever finds it counts everything, poison too.
REPAIRED: Final = "repaired"


def id_of(producer: str, number: int) -> bytes:
    """Return the id under which a message is always sent."""
    return hashlib.blake2b(f"{producer} {number}".encode(), digest_size=16).digest()


def body_of(producer: str, number: int) -> bytes:
    """Return the only right body of a message."""
    return f"{producer} {number} ".encode() * (1 + number % 5)


def fate(number: int) -> str:
    """Return what a consumer does with a message."""
    if number % 29 == 0:
        return "reject"
    if number % 31 == 0:
        return "raise"
    if number % 7 == 0:
        return "nack"
    return "long" if number % 5 == 0 else "ack"


class _Log:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(self, what: str, id_: bytes, attempt: int | None = None) -> None:
        number = "" if attempt is None else f" {attempt}"
        os.write(self._file, f"{what} {id_.hex()}{number} {time.monotonic():.6f}\n".encode())


async def _produce(url: str, path: Path, name: str) -> None:
    """Send for ever; go on behind what an earlier life has tried."""
    tried = path.read_text().count("try ") if path.exists() else 0
    log = _Log(path)
    dice = random.Random(f"{name} {tried}")
    async with await open_queue(url) as queue:
        number = tried
        while True:
            batch = range(number, number + dice.randint(1, 12))
            messages = [
                Message(body_of(name, n), id_of(name, n), delay=0.2 if n % 11 == 0 else 0.0)
                for n in batch
            ]
            while messages:
                for message in messages:
                    log.write("try", message.id)
                failed: set[int] = set()
                try:
                    await queue.send_many(messages)
                except SendManyError as error:
                    failed = set(error.failures)
                for at, message in enumerate(messages):
                    if at not in failed:
                        log.write("sent", message.id)
                messages = [message for at, message in enumerate(messages) if at in failed]
            number = batch.stop
            await asyncio.sleep(dice.uniform(0.0, 0.2))


async def _consume(url: str, path: Path, name: str, mutant: str) -> None:
    log = _Log(path)
    dice = random.Random(f"{name} {os.getpid()}")
    repaired = path.parent / REPAIRED
    queue = await open_queue(url, max_attempts=MAX_ATTEMPTS)
    if mutant == "stale-ack":
        driver = queue._driver
        driver._delete = f"DELETE FROM {driver._table} WHERE offset = ? AND ? > 0"  # type: ignore[attr-defined]

    async def handle(delivery: Delivery) -> None:
        message, attempt = delivery.message, delivery.attempt
        log.write("begin", message.id, attempt)
        producer, number = message.body.split()[:2]
        if message.body != body_of(producer.decode(), int(number)):
            log.write("bad", message.id)
        what = "ack" if repaired.exists() else fate(int(number))
        if mutant == "ack-first":
            await delivery.ack()
        await asyncio.sleep(dice.uniform(*(_LONG_WORK if what == "long" else _WORK)))
        try:
            # What raises does so at its last attempt: before, the pauses would take seconds.
            if attempt < {"nack": 2, "raise": MAX_ATTEMPTS}.get(what, 0):
                await delivery.nack(delay=dice.uniform(0.0, 0.3))
                log.write("nack", message.id, attempt)
            elif what == "reject":
                await delivery.reject("poison")
                log.write("reject", message.id, attempt)
            elif what == "raise":
                log.write("raise", message.id, attempt)
                raise _HandlerError
            else:
                log.write("done", message.id, attempt)
                if mutant != "ack-first":
                    await delivery.ack()
                log.write("ack", message.id, attempt)
        except LeaseLostError:
            log.write("late", message.id, attempt)

    async with queue:
        while True:
            # A locked file, say: a consumer goes on when it can.
            with contextlib.suppress(UnavailableError):
                await queue.run(handle, concurrency=8)
                return


class _HandlerError(Exception):
    """What a handler raises whenever it is given this message."""


def main() -> None:
    """Do what the command line says."""
    role, url, path, name = sys.argv[1:5]
    mutant = sys.argv[5] if len(sys.argv) > 5 else ""
    work = (
        _produce(url, Path(path), name)
        if role == "produce"
        else _consume(url, Path(path), name, mutant)
    )
    asyncio.run(work)


if __name__ == "__main__":
    main()
