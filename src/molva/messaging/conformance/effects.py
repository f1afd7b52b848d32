"""The effect is exactly once: a consumer that records ids, under duplicates and kills."""

import asyncio
import random
import sqlite3
from pathlib import Path

from molva.messaging.conformance.actors import Start
from molva.messaging.conformance.harness import Harness, Suite, needs
from molva.messaging.conformance.waiting import PATIENCE, eventually
from molva.messaging.message import Message

__all__ = ["Effects"]

_MESSAGES = 1_000


class Effects(Suite):
    """At least once, with a unique id beside the effect, is exactly once."""

    @needs("shared")
    async def test_the_effect_is_exactly_once_under_duplicates_and_kills(
        self, h: Harness, start: Start, tmp_path: Path
    ) -> None:
        h.use_processes()
        dice = random.Random(11)
        path = tmp_path / "effects.db"
        file = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("CREATE TABLE effect (id BLOB PRIMARY KEY, value INTEGER, times INTEGER)")
        sender = await h.sender()
        await (await h.consumer()).close()
        workers = [await (await start("apply", h.consumer_url(), str(path))).ready()]
        messages = [Message(b"%d" % n, key=str(n % 40)) for n in range(_MESSAGES)]
        twice = dice.sample(messages, _MESSAGES // 20)  # as by clients that ask again

        kills = 3
        for part in range(kills + 1):
            await sender.send_many(messages[part :: kills + 1])
            await sender.send_many(twice[part :: kills + 1])
            doomed = workers[-1]
            await eventually(lambda worker=doomed: len(worker.lines) > 20)  # type: ignore[misc]
            if part < kills:
                await doomed.kill()
                workers.append(await (await start("apply", h.consumer_url(), str(path))).ready())

        def effects() -> int:
            return int(file.execute("SELECT count(*) FROM effect").fetchone()[0])

        async with asyncio.timeout(PATIENCE + kills * (h.lease + h.death_interval)):
            while effects() < _MESSAGES:
                await asyncio.sleep(0.02)
        [total, times] = file.execute("SELECT sum(value), sum(times) FROM effect").fetchone()
        file.close()

        assert total == sum(range(_MESSAGES))
        # Of a killed consumer, what its eight handlers were at; of lanes, the tail as well.
        most = kills * 8 if h.can("by-message") else kills * _MESSAGES
        extra = times - _MESSAGES - len(twice)
        h.count_duplicates(["extra"] * (extra + 1), most=most, why="kill")
