"""Starts ``molva`` with something added: a witness, a wrong clock, or a bug on purpose.

python launch.py ADDED[,ADDED…] COMMAND ARGUMENT…

    witness=FILE          a worker appends a line for each batch: how many messages it was
                          given, how many ratings it applied, and how many it met again
    window=RATINGS        a ledger in Redis keeps so many ratings of an item and of a campaign one
                          by one: all of a run, so that the checker sees all
    wall=SECONDS          the wall clock goes wrong by so much
    checkpoint=PAGES      the write-ahead log is copied back after so many pages
    slow-sync=SECONDS     a disk whose syncs take so much longer: what a cut finds written and
                          not synced is there for longer

and the mutants, each of which breaks one promise; the checker must find every one:

    ack-before-commit     the worker acknowledges what it takes before it has counted it
    early-202             /rate answers before the broker has confirmed
    fresh-ids             /rate makes an id of its own, whatever the client sent
    drop-poison           the worker throws dead letters away
    not-synced            commits of queue and ledger return without their fsync

A mutant is not an option of Molva, nor a variable of its environment: a switch that makes
a service lose ratings must not exist in it. So they live here, and are put in from outside.
"""

import asyncio
import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from molva.cli.main import main
from molva.messaging import Delivery, Subscription, Topic

# Of each scheme, where the class of its ledger is.
_LEDGERS: Final = {
    "sqlite": ("molva.ratings.ledger.sqlite", "SQLiteLedger"),
    "postgresql": ("molva.ratings.ledger.postgresql", "PostgreSQLLedger"),
    "redis": ("molva.ratings.ledger.redis", "RedisLedger"),
}

# What SQLite uses and does not hold.
_kept: Final[list[object]] = []
_background: Final[set["asyncio.Task[None]"]] = set()


def _put(owner: object, name: str, value: object) -> None:
    """Replace something of the service's. What is not there any more fails, and loudly."""
    assert hasattr(owner, name), f"{owner} has no {name}: this mutant needs to be adapted"
    setattr(owner, name, value)


def witness(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    scheme = sys.argv[sys.argv.index("--ledger") + 1].partition(":")[0]
    module, name = _LEDGERS[scheme]
    ledger = getattr(importlib.import_module(module), name)
    original = ledger.apply

    async def apply(self: Any, batch: Sequence[Any], *, applied_at_us: int) -> Any:
        outcomes = await original(self, batch, applied_at_us=applied_at_us)
        count = Counter(getattr(outcome, "name", "FAILED") for outcome in outcomes)
        line = " ".join(f"{name}={number}" for name, number in sorted(count.items()))
        os.write(descriptor, f"{line}\n".encode())
        return outcomes

    _put(ledger, "apply", apply)
    receive = Subscription.receive

    async def receive_and_tell(self: Subscription, *args: Any, **kwargs: Any) -> list[Delivery]:
        deliveries = await receive(self, *args, **kwargs)
        if deliveries:
            os.write(descriptor, f"RECEIVED={len(deliveries)}\n".encode())
        return deliveries

    _put(Subscription, "receive", receive_and_tell)


def window(ratings: str) -> None:
    from molva.ratings.ledger import redis

    _put(redis, "_WINDOW", int(ratings))


def wall(seconds: str) -> None:
    shift = float(seconds)
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + shift
    time.time_ns = lambda: real_ns() + int(shift * 1e9)


def checkpoint(pages: str) -> None:
    from molva._base import sqlite_writer

    _put(sqlite_writer, "CHECKPOINT_PAGES", int(pages))


def slow_sync(seconds: str) -> None:
    import apsw

    class File(apsw.VFSFile):
        def __init__(self, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
            super().__init__("unix", name, flags)

        def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
            time.sleep(float(seconds))
            super().xSync(flags)

    class Disk(apsw.VFS):
        def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> File:  # noqa: N802
            return File(name, flags)

    _kept.append(Disk("slow-sync", "unix", makedefault=True))


def ack_before_commit(_: str) -> None:
    receive, settle = Subscription.receive, Subscription.settle

    async def receive_and_ack(self: Subscription, *args: Any, **kwargs: Any) -> list[Delivery]:
        deliveries = await receive(self, *args, **kwargs)
        if deliveries:
            from molva.messaging import Action

            await settle(self, [(delivery, Action.ACK) for delivery in deliveries])
        return deliveries

    async def nothing(*_args: Any, **_kwargs: Any) -> None: ...

    _put(Subscription, "receive", receive_and_ack)
    _put(Subscription, "settle", nothing)


def early_202(_: str) -> None:
    send = Topic.send

    async def send_later(self: Topic, message: Any) -> None:
        async def later() -> None:
            # Nobody is there any more whom an error could be told.
            try:
                await send(self, message)
            except Exception as error:  # noqa: BLE001 - as careless as the bug it stands for
                print("a rating was lost:", error, file=sys.stderr)

        task = asyncio.ensure_future(later())
        _background.add(task)
        task.add_done_callback(_background.discard)

    _put(Topic, "send", send_later)


def fresh_ids(_: str) -> None:
    from molva.ratings import intake

    _put(intake, "_own_id", lambda *_: None)


def drop_poison(_: str) -> None:
    from molva.messaging import Action

    settle = Subscription.settle

    async def settle_all(
        self: Subscription,
        settlements: Sequence[tuple[Delivery, Action]],
        *,
        delay: float = 0.0,
        reason: str = "",
    ) -> None:
        await settle(self, [(delivery, Action.ACK) for delivery, _ in settlements])

    _put(Subscription, "settle", settle_all)


def not_synced(_: str) -> None:
    from molva._base import sqlite_writer

    original = sqlite_writer.SQLiteWriter.__init__

    def init(self: Any, connection: Any, **kwargs: Any) -> None:
        connection.pragma("synchronous", "normal")
        original(self, connection, **kwargs)

    _put(sqlite_writer.SQLiteWriter, "__init__", init)


_ADDED: Final[dict[str, Callable[[str], None]]] = {
    "witness": witness,
    "window": window,
    "wall": wall,
    "checkpoint": checkpoint,
    "slow-sync": slow_sync,
    "ack-before-commit": ack_before_commit,
    "early-202": early_202,
    "fresh-ids": fresh_ids,
    "drop-poison": drop_poison,
    "not-synced": not_synced,
}


if __name__ == "__main__":
    for word in sys.argv[1].split(","):
        name, _, value = word.partition("=")
        _ADDED[name](value)
    del sys.argv[1]
    main()
