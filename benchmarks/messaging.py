"""Messaging on SQLite against raw apsw, and against other queues in a SQLite file."""

import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import apsw
import litequeue
import persistqueue

from benchmarks.report import Report
from molva.messaging import Message, open_topic

BATCH = 1_000
MESSAGES = 50_000
TURNS = 5
PRODUCERS = 64
BODY = b'{"kind":"rating/1","campaign":"default","accepted_at_us":1700000000000000,"rate":7}'


def messaging() -> None:
    """Measure sending."""
    report = Report(
        "messaging",
        "Messaging on SQLite: messages a second",
        f"Bodies of {len(BODY)} bytes; {TURNS} turns, one after the other in each; a fresh file each "
        "turn. All of them with WAL and synchronous=FULL: kill and power are survived.",
    )
    many: list[float] = []
    raw: list[float] = []
    ours: list[float] = []
    lite: list[float] = []
    persist: list[float] = []
    for _ in range(TURNS):
        many.append(_in_folder(lambda folder: asyncio.run(_send_many(folder))))
        raw.append(_in_folder(_raw_apsw))
        ours.append(_in_folder(lambda folder: asyncio.run(_producers(folder))))
        lite.append(_in_folder(_litequeue))
        persist.append(_in_folder(_persistqueue))
    report.ratio("send_many / raw apsw, the same inserts in the same batches", many, raw, "0.7")
    report.ratio(f"{PRODUCERS} producers / litequeue", ours, lite, "10")
    report.ratio(f"{PRODUCERS} producers / persist-queue", ours, persist, "10")
    report.write()


def _in_folder(measure: Callable[[Path], float]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


async def _send_many(folder: Path) -> float:
    async with await open_topic(f"sqlite://{folder}/queue.db?topic=t") as topic:
        started = time.perf_counter()
        for _ in range(MESSAGES // BATCH):
            await topic.send_many([Message(BODY, key="k") for _ in range(BATCH)])
        return MESSAGES / (time.perf_counter() - started)


def _raw_apsw(folder: Path) -> float:
    """Insert the same rows, made in the same place, with nothing around them."""
    connection = apsw.Connection(str(folder / "queue.db"))
    connection.pragma("journal_mode", "wal")
    connection.pragma("synchronous", "full")
    connection.wal_autocheckpoint(4_000)
    connection.execute(
        "CREATE TABLE message_1 (offset INTEGER PRIMARY KEY, lane INTEGER NOT NULL, id BLOB NOT "
        "NULL, key TEXT, headers TEXT, body BLOB NOT NULL, stored_at_us INTEGER NOT NULL) STRICT"
    )
    insert = "INSERT INTO message_1 VALUES (?, ?, ?, ?, ?, ?, ?)"
    started = time.perf_counter()
    offset = 0
    for _ in range(MESSAGES // BATCH):
        now = time.time_ns() // 1_000
        messages = [Message(BODY, key="k") for _ in range(BATCH)]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            insert,
            ((offset + at, 3, m.id, m.key, None, m.body, now) for at, m in enumerate(messages)),
        )
        connection.execute("COMMIT")
        offset += BATCH
    found = MESSAGES / (time.perf_counter() - started)
    connection.close()
    return found


async def _producers(folder: Path) -> float:
    """64 tasks, each sending its next message when the last one was confirmed."""
    async with await open_topic(f"sqlite://{folder}/queue.db?topic=t") as topic:

        async def produce(number: int) -> None:
            for _ in range(number):
                await topic.send(Message(BODY))

        started = time.perf_counter()
        await asyncio.gather(*(produce(500) for _ in range(PRODUCERS)))
        return PRODUCERS * 500 / (time.perf_counter() - started)


def _in_threads(put: Callable[[], object], each: int) -> float:
    def produce() -> None:
        for _ in range(each):
            put()

    threads = [threading.Thread(target=produce) for _ in range(PRODUCERS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return PRODUCERS * each / (time.perf_counter() - started)


def _litequeue(folder: Path) -> float:
    """Its own default, synchronous=NORMAL, does not survive a power cut; so FULL here."""
    queue = litequeue.LiteQueue(str(folder / "queue.db"))
    queue.conn.execute("PRAGMA synchronous = FULL")
    # One connection for all threads, as its documentation asks for.
    lock = threading.Lock()
    text = BODY.decode()

    def put() -> None:
        with lock:
            queue.put(text)

    found = _in_threads(put, 30)
    assert queue.qsize() == PRODUCERS * 30
    queue.close()
    return found


def _persistqueue(folder: Path) -> float:
    """WAL and SQLite's own default, synchronous=FULL; a commit a message."""
    queue = persistqueue.SQLiteAckQueue(str(folder), multithreading=True, auto_commit=True)
    found = _in_threads(lambda: queue.put(BODY), 30)
    assert queue.size == PRODUCERS * 30
    queue.close()
    return found
