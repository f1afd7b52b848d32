"""Every mistake that is planted on purpose, and the net that must find it.

A net that finds nothing proves nothing, unless it is known to find what is there. So each entry
is a bug that somebody could write, or has written, put into the product from outside: by a
line of its source that is replaced, or a function. There is no switch in the product itself.

    simulation     runs on a virtual clock (``simulation``). One run of the net is 50 seeds.
    model          random operations on a real queue beside a plain model (``simulation``)
    tests          the tests named here
    crash points   every point at which a machine can stop (``crash``)
    live           real processes under real faults (``live``)

Those of the last two are put in and proved where they stand, by the test named here.
``test_mutants.py`` proves the others: each is found within three runs.

``python -m tests.faults.mutants NAME ARGUMENT…`` runs pytest with a mutant put in.
"""

import asyncio
import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, final
from unittest.mock import patch
from weakref import WeakKeyDictionary

import apsw

from molva._base import sqlite_writer
from molva._base.sqlite_file import transaction
from molva.messaging import (
    _batching,
    _lanes,
    _leases,
    _receiving,
    _running,
    _sending,
)
from molva.messaging.drivers import _memory_queue, _sqlite_file, memory
from molva.ratings import intake, worker
from molva.ratings.ledger import _apply, _reads, _schema, _tallies
from molva.ratings.ledger import sqlite as ledger
from molva.ratings.ledger._content import content_of
from molva.ratings.ledger.protocol import Outcome, Total
from molva.ratings.request import ProblemError
from tests.faults.simulation import run
from tests.faults.simulation.plan import Plan

__all__ = ["MUTANTS", "Mutant"]

Net = Literal["simulation", "model", "tests", "crash points", "live"]
Put = Callable[[], AbstractContextManager[object]]


@final
@dataclass(frozen=True, slots=True)
class Mutant:
    """A planted mistake.

    Attributes:
        what: What it does, in the words of whoever would write it.
        net: Which net must find it.
        put: Puts it in, for a ``with`` block.
        where: Of the simulation's seeds only those whose plan is such.
        tests: The tests that find it, or (crash points, live) that prove that it is found.
        note: Whether it is one of the thirteen that every such project should have.
    """

    name: str
    what: str
    net: Net
    put: Put = contextlib.nullcontext
    where: Callable[[Plan], bool] = lambda _: True
    tests: Sequence[str] = ()
    note: bool = False


# How to put one in -----------------------------------------------------------------------


def _line(owner: Any, name: str, old: str, new: str) -> Put:
    """Replace a piece of a function's source, which must stand there once."""

    def put() -> AbstractContextManager[object]:
        original = inspect.getattr_static(owner, name)
        function = original.__func__ if isinstance(original, staticmethod) else original
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(old) == 1, f"{name} has {old!r} {source.count(old)} times: adapt this"
        module = sys.modules[function.__module__]
        made: dict[str, Any] = {}
        flags = compile("from __future__ import annotations", "", "exec").co_flags & 0x1000000
        code = compile(source.replace(old, new), f"<mutant of {name}>", "exec", flags)
        exec(code, vars(module) | {"asyncio": asyncio}, made)
        return patch.object(owner, name, made[name])

    return put


def _function(owner: Any, name: str, function: object) -> Put:
    """Replace a function."""

    def put() -> AbstractContextManager[object]:
        assert hasattr(owner, name), f"{owner} has no {name}: adapt this mutant"
        return patch.object(owner, name, function)

    return put


def _all(*puts: Put) -> Put:
    @contextlib.contextmanager
    def put() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in puts:
                stack.enter_context(each())
            # The empty ledger that every run begins with is made by the mutant as well.
            run._empty_ledger.cache_clear()
            try:
                yield
            finally:
                run._empty_ledger.cache_clear()

    return put


# Functions that stand in for others -------------------------------------------------------

_NO_UNIQUE_IDS: Final = _function(
    ledger,
    "MIGRATIONS",
    tuple(
        script.replace("UNIQUE INDEX entry_by_id", "INDEX entry_by_id")
        for script in _schema.MIGRATIONS
    ),
)


async def _look_then_write(self: Any, batch: Sequence[Any], *, applied_at_us: int) -> Any:
    """Look for known ids in one transaction, and write the others in another."""

    def known(connection: apsw.Connection) -> set[bytes]:
        sql = "SELECT 1 FROM entry WHERE id = ?"
        return {s.id for s in batch if connection.execute(sql, (s.id,)).fetchone()}

    seen = self._read(known)
    await asyncio.sleep(0.01)
    fresh = [s for s in batch if s.id not in seen]
    await self._write(lambda c: _apply.apply_on_trust(c, fresh, applied_at_us))
    return [Outcome.DUPLICATE if s.id in seen else Outcome.APPLIED for s in batch]


async def _rows_then_totals(self: Any, batch: Sequence[Any], *, applied_at_us: int) -> Any:
    """Write the rows in one transaction, and the totals in another."""
    made: list[Any] = []

    def rows(connection: apsw.Connection) -> list[Any]:
        writing = _apply._Batch(connection, applied_at_us)
        made.append(writing)
        return [writing.apply_one(submission) for submission in batch]

    outcomes = await self._write(rows)
    await asyncio.sleep(0.01)
    await self._write(lambda _: made[-1].flush())
    return outcomes


async def _by_content(self: Any, batch: Sequence[Any], *, applied_at_us: int) -> Any:
    """Take equal ratings for one rating."""
    once = list({content_of(submission.entry): submission for submission in batch}.values())
    outcomes = dict(
        zip((s.id for s in once), await _apply_batch(self, once, applied_at_us=applied_at_us))  # noqa: B905
    )
    return [outcomes.get(submission.id, Outcome.DUPLICATE) for submission in batch]


async def _as_of_apart(self: Any, campaign: str, **more: Any) -> Any:
    """Read the total in one snapshot, and what it is as of in another."""
    found = await _read_total(self, campaign, **more)
    await asyncio.sleep(0.05)
    if found is None:
        return None
    as_of = await self.last_seq(campaign)
    return Total(found.sum, found.n, found.count, found.distribution, as_of)


async def _kept_answer(self: Any, scope: Any, receive: Any) -> Any:
    """Answer a total from a cache of this process for a few seconds."""
    kept = self.__dict__.setdefault("kept", {})
    query = scope["query_string"]
    at, answer = kept.get(query, (float("-inf"), None))
    if self._clock.monotonic() - at > 3.0:
        answer = await _total(self, scope, receive)
        kept[query] = (self._clock.monotonic(), answer)
    return answer


async def _send_later(self: Any, id_: bytes, rating: Any) -> None:
    """Answer first and store afterwards."""

    async def later() -> None:
        with contextlib.suppress(ProblemError):
            await _store(self, id_, rating)

    asyncio.ensure_future(later())  # noqa: RUF006 - as careless as the bug it stands for


def _swallowing(self: Any, work: Any) -> Any:
    """Take a failed fsync for one that will succeed later."""
    result = None
    with contextlib.suppress(apsw.IOError), transaction(self._connection):
        result = work(self._connection)
    return result


def _not_synced(self: Any, connection: apsw.Connection, **more: Any) -> None:
    connection.pragma("synchronous", "normal")
    _begin_writer(self, connection, **more)


_kept: Final = WeakKeyDictionary[apsw.Connection, dict[str, Any]]()


def _kept_tallies(self: Any, connection: apsw.Connection) -> None:
    """Keep what a batch has read for the next one."""
    _begin_tallies(self, connection)
    self.campaigns = _kept.setdefault(connection, {})


_INSERT: Final = _apply._INSERT_ENTRY
_apply_batch: Final = ledger.SQLiteLedger.apply
_read_total: Final = ledger.SQLiteLedger.total
_total: Final = intake.Intake._total
_store: Final = intake.Intake._store
_begin_writer: Final = sqlite_writer.SQLiteWriter.__init__
_begin_tallies: Final = _tallies.Tallies.__init__


# The table --------------------------------------------------------------------------------

_LEDGER: Final = ledger.SQLiteLedger
_LIVE: Final = "tests/faults/live/test_live.py::test_a_service_that_breaks_a_promise_is_found"
_CRASH: Final = "tests/faults/crash/test_crash_points.py::"
_ERRORS: Final = "tests/faults/crash/test_errors.py::"
_DAMAGE: Final = "tests/faults/crash/test_damage.py::"
_LIVE_PAIRS: Final = (
    "tests/faults/live/test_pairs.py::test_a_service_that_breaks_a_promise_is_found",
)
_LIVE_QUEUES: Final = (
    "tests/faults/live/test_queues.py::test_a_queue_that_breaks_a_promise_is_found"
)

_ALL: Final = (
    Mutant(
        "ack-first",
        "the worker acknowledges a batch, then applies it",
        "simulation",
        _line(
            worker.Worker,
            "_process",
            "outcomes = await self._apply(submissions)",
            "await self._settle([(d, Action.ACK) for d in good], []); "
            "outcomes = await self._apply(submissions)",
        ),
        lambda plan: not plan.handlers,
        note=True,
    ),
    Mutant(
        "no-dedupe",
        "ids are not unique in the ledger",
        "simulation",
        _all(_NO_UNIQUE_IDS),
        note=True,
    ),
    Mutant(
        "dedupe-outside",
        "known ids are looked up before the transaction that inserts",
        "simulation",
        _all(_NO_UNIQUE_IDS, _function(_LEDGER, "apply", _look_then_write)),
        note=True,
    ),
    Mutant(
        "not-synced",
        "commits return without their fsync",
        "simulation",
        _function(sqlite_writer.SQLiteWriter, "__init__", _not_synced),
        lambda plan: plan.disk,
        note=True,
    ),
    Mutant(
        "early-202",
        "/rate answers before the broker has confirmed",
        "simulation",
        _function(intake.Intake, "_store", _send_later),
        note=True,
    ),
    Mutant(
        "ack-on-receive",
        "a message is acknowledged when it is handed over",
        "simulation",
        _line(
            _receiving.Receiving,
            "_begin_receiving",
            'self._url.delivery == "at-most-once"',
            'self._url.delivery == "at-least-once"',
        ),
        note=True,
    ),
    Mutant(
        "two-transactions",
        "ids and totals are written in two transactions",
        "simulation",
        _all(_function(_LEDGER, "apply", _rows_then_totals)),
        note=True,
    ),
    Mutant(
        "highest-settled",
        "the watermark is the highest settled offset",
        "simulation",
        _line(
            _lanes._Lane,
            "advance",
            "while delivered and delivered[0] not in open_ and delivered[0] != nacked:",
            "while delivered and any(offset not in open_ for offset in delivered):",
        ),
        lambda plan: plan.broker.holding == "lane" and plan.handlers,
        note=True,
    ),
    Mutant(
        "drop-poison",
        "what cannot be counted is acknowledged",
        "simulation",
        _line(
            worker.Worker,
            "_settle",
            "append((delivery, Action.REJECT))",
            "append((delivery, Action.ACK))",
        ),
        note=True,
    ),
    Mutant(
        "fresh-ids",
        "/rate makes an id of its own for each attempt",
        "simulation",
        _function(intake, "_own_id", lambda *_: None),
        note=True,
    ),
    Mutant(
        "fsync-swallowed",
        "a failed fsync is taken for one that will succeed later",
        "simulation",
        _function(sqlite_writer.SQLiteWriter, "_transact", _swallowing),
        lambda plan: plan.disk,
        note=True,
    ),
    Mutant(
        "float-average",
        "the ledger keeps a running average, and makes the sum of it",
        "simulation",
        _line(
            _apply._Batch,
            "_rating_rows",
            "whole.sum += rate",
            "whole.sum = int((whole.sum / (whole.count - 1 or 1) * (whole.count - 1) / whole.count "
            "+ rate / whole.count) * whole.count)",
        ),
        note=True,
    ),
    Mutant(
        "trim-ahead",
        "rows are forgotten that only the fastest subscription has read",
        "model",
        _line(memory._Log, "trim", "done = min(", "done = max("),
        note=True,
    ),
    Mutant(
        "one-outcome",
        "a batch has one outcome for all",
        "simulation",
        _line(_batching.Batcher, "_answer", "result = results[at]", "result = results[0]"),
    ),
    Mutant(
        "error-is-stored",
        "a send that failed is taken for one that was stored",
        "simulation",
        _line(
            _sending.Sending,
            "_send_batch",
            "counters.failed += len(messages)\n        raise\n",
            "return [Outcome.STORED] * len(messages)\n",
        ),
    ),
    Mutant(
        "full-is-202",
        "a rating that finds no room is accepted and dropped",
        "simulation",
        _line(
            intake.Intake,
            "_store_otherwise",
            'raise _unavailable("overloaded", str(error), 1) from None',
            "return",
        ),
    ),
    Mutant(
        "as-of-apart",
        "a total and its as_of are read in two snapshots",
        "simulation",
        _function(_LEDGER, "total", _as_of_apart),
    ),
    Mutant(
        "cached-total",
        "each HTTP process keeps its answers for a few seconds",
        "simulation",
        _function(intake.Intake, "_total", _kept_answer),
        lambda plan: plan.servers > 1,
    ),
    Mutant(
        "equal-is-same",
        "equal ratings are taken for one",
        "simulation",
        _function(_LEDGER, "apply", _by_content),
    ),
    Mutant(
        "last-wins",
        "a rating under a used id replaces the first one",
        "simulation",
        _function(_apply, "_INSERT_ENTRY", f"INSERT OR REPLACE {_INSERT.removeprefix('INSERT ')}"),
    ),
    Mutant(
        "kept-tallies",
        "a process keeps totals from one transaction to the next",
        "simulation",
        _all(_function(_tallies.Tallies, "__init__", _kept_tallies)),
        lambda plan: plan.workers > 1 and plan.commit == "thread",
    ),
    Mutant(
        "no-catalog-no-campaign",
        "a campaign that cannot be looked up is one that does not exist",
        "simulation",
        _line(
            worker.Worker,
            "_process",
            "campaigns = await self._look_up()",
            "campaigns = {} if self._campaigns._catalog.down else await self._look_up()",
        ),
    ),
    Mutant(
        "no-lines",
        "handlers of one key run side by side",
        "simulation",
        _line(
            _running.Runner,
            "start",
            "line: object = delivery.message.id if key is None else key",
            "line: object = (delivery.message.id, delivery.token)",
        ),
        lambda plan: plan.broker.ordered and plan.handlers,
    ),
    Mutant(
        "read-is-settled",
        "a lane goes on at what was read, not at what is settled",
        "simulation",
        _line(_lanes._Lane, "advance", "if not delivered:", "if True:"),
        lambda plan: plan.broker.holding == "lane" and plan.handlers,
    ),
    Mutant(
        "stale-token",
        "a settlement is heeded whichever hand-over it names",
        "model",
        _line(
            _memory_queue.MemoryQueue,
            "_ours",
            "row.held and row.turn == turn",
            "row.held",
        ),
    ),
    Mutant(
        "nack-at-once",
        "a nacked message comes again at once, whatever its delay",
        "model",
        _line(
            _memory_queue.MemoryQueue,
            "settle_batch",
            "if delay > 0:",
            "if delay < 0:",
        ),
    ),
    Mutant(
        "nack-uncounted",
        "a nacked message comes again as the same attempt",
        "model",
        _line(
            _memory_queue.MemoryQueue,
            "settle_batch",
            "attempt if action is Action.NACK else attempt - 1",
            "attempt - 1",
        ),
    ),
    Mutant(
        "extend-shortens",
        "an extended lease still ends when it would have",
        "model",
        _line(
            _memory_queue.MemoryQueue,
            "extend_batch",
            "self._store.put_off(row, now + seconds)",
            "pass",
        ),
    ),
    Mutant(
        "replay-counts-on",
        "a dead letter that is sent back keeps the attempts that it had",
        "model",
        _line(
            _memory_queue.MemoryQueue,
            "replay",
            "store.add(again, now=now, now_us=now_us)",
            "store.add(again, now=now, now_us=now_us); "
            "store.rows[store._last].attempt = letter.attempts",
        ),
    ),
    Mutant(
        "lease-runs-out",
        "leases are not extended while a handler runs",
        "tests",
        _line(_leases.LeaseKeeper, "_keep", "if not held:", "if held:"),
        tests=("tests/messaging/test_memory.py", "-k", "run_keeps_leases"),
    ),
    Mutant(
        "epoch-stays",
        "a lane that is owned again has its old epoch",
        "tests",
        _line(_lanes.LaneReader, "own", "self._epoch += 1", "self._epoch = 1"),
        tests=("tests/messaging/test_memory.py", "-k", "token_stays_stale"),
    ),
    Mutant(
        "prefetch-kept",
        "what was taken ahead is not given back",
        "tests",
        _line(_receiving.Receiving, "_give_back", "if self._closed:", "if True:"),
        tests=("tests/messaging/test_memory.py", "-k", "cancelled_run_gives_everything_back"),
    ),
    Mutant(
        "window-off-by-one",
        "a window begins one rating late where a correction stands",
        "tests",
        _line(
            _reads,
            "position_before",
            "counted + step + d_node_count <= left_out",
            "counted + step + d_node_count < left_out",
        ),
        tests=("tests/ratings/test_ledger_sqlite.py", "-k", "trusted_window"),
    ),
    Mutant(
        "no-checksum",
        "a message's checksum is not looked at",
        "tests",
        _function(_sqlite_file, "checksum_of", lambda *_: 0),
        tests=("tests/messaging/test_sqlite_topic.py", "-k", "flipped_bit"),
    ),
    Mutant(
        "ack-before-commit",
        "the worker acknowledges what it takes before it has counted it",
        "live",
        tests=(_LIVE,),
    ),
    Mutant("early-202-live", "as early-202, in real processes", "live", tests=(_LIVE,)),
    Mutant("fresh-ids-live", "as fresh-ids, in real processes", "live", tests=(_LIVE,)),
    Mutant("drop-poison-live", "as drop-poison, in real processes", "live", tests=(_LIVE,)),
    Mutant(
        "not-synced-live",
        "as not-synced, with the power cut",
        "live",
        tests=("tests/faults/live/test_power.py::test_a_service_that_does_not_sync_is_found",),
    ),
    Mutant(
        "wal-not-synced",
        "the write-ahead log is not synced",
        "crash points",
        tests=(_CRASH + "test_commits_that_are_not_synced_are_found",),
    ),
    Mutant(
        "early-promise",
        "a rating counts as applied before its commit",
        "crash points",
        tests=(_CRASH + "test_a_promise_made_before_its_commit_is_found",),
    ),
    Mutant(
        "torn-commit",
        "half a commit is taken for whole",
        "crash points",
        tests=(_CRASH + "test_rows_and_totals_of_two_commits_are_found",),
    ),
    Mutant(
        "sync-tried-again",
        "a sync that failed is tried again, and believed",
        "crash points",
        tests=(_ERRORS + "test_a_failed_sync_that_is_tried_again_is_found",),
    ),
    Mutant(
        "others-write-on",
        "other connections write behind a sync that failed",
        "crash points",
        tests=(_ERRORS + "test_others_who_write_behind_a_failed_sync_are_found",),
    ),
    Mutant(
        "ack-before-failed-commit",
        "a batch is acknowledged before a commit that may fail",
        "crash points",
        tests=(_ERRORS + "test_a_batch_acknowledged_before_its_commit_is_found",),
    ),
    Mutant(
        "unguarded-files",
        "nothing guards a file's messages, or the end of its log, against damage",
        "crash points",
        tests=(_DAMAGE + "test_damage_that_nothing_guards_against_is_found",),
    ),
    Mutant(
        "ack-before-commit-pairs",
        "as ack-before-commit, in real processes on Kafka and PostgreSQL",
        "live",
        tests=_LIVE_PAIRS,
    ),
    Mutant(
        "early-202-pairs",
        "as early-202, in real processes on Kafka and PostgreSQL",
        "live",
        tests=_LIVE_PAIRS,
    ),
    Mutant(
        "stale-ack-live",
        "a late ack settles what somebody else holds, in real processes",
        "live",
        tests=(_LIVE_QUEUES,),
    ),
    Mutant(
        "ack-first-live",
        "a consumer acknowledges before it works, in real processes",
        "live",
        tests=(_LIVE_QUEUES,),
    ),
)

MUTANTS: Final = {mutant.name: mutant for mutant in _ALL}
assert len(MUTANTS) == len(_ALL), "two mutants have one name"


def main() -> int:
    """Run pytest with a mutant put in."""
    import pytest

    # By its module's name: run as a script, this file is another copy of itself.
    from tests.faults import mutants

    name, *arguments = sys.argv[1:]
    with mutants.MUTANTS[name].put():
        return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
