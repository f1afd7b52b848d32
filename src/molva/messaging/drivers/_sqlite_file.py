"""The file behind the SQLite driver: its schema, its options, finding what a URL names."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final, cast, final

import apsw

from molva._base.clock import Clock
from molva._base.sqlite_file import (
    SQLiteFileError,
    UnusableFileError,
    open_sqlite,
    transaction,
)
from molva._base.sqlite_writer import BrokenFileError, CommitOn, SQLiteWriter
from molva._base.url import one_of, positive_integer
from molva.messaging._lanes import MAX_LANES
from molva.messaging.driver import Capabilities, DeadLetter, SubscriptionStat, TopicStat
from molva.messaging.errors import (
    BrokenBrokerError,
    IncompatibleBrokerError,
    InvalidURLError,
    TopicNotFoundError,
    UnavailableError,
)
from molva.messaging.message import NO_HEADERS, Message
from molva.messaging.url import COMMON_OPTIONS, BrokerURL

__all__ = [
    "OPTIONS",
    "FileOptions",
    "QueueFile",
    "SQLiteSide",
    "message_of",
    "one",
    "select",
    "translated",
]

OPTIONS: Final = ("lanes", "capacity", "start", "max_open", "commit", "vfs")

_APPLICATION_ID: Final = 0x4D4C_5651  # "MLVQ"

_MIGRATIONS: Final = (
    """
    CREATE TABLE topic (
        topic_id      INTEGER PRIMARY KEY,
        name          TEXT NOT NULL UNIQUE,
        lanes         INTEGER NOT NULL,
        last_offset   INTEGER NOT NULL,
        created_at_us INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE subscription (
        subscription_id INTEGER PRIMARY KEY,
        topic_id        INTEGER NOT NULL REFERENCES topic,
        name            TEXT NOT NULL,
        start_offset    INTEGER NOT NULL,
        dead            INTEGER NOT NULL DEFAULT 0,
        created_at_us   INTEGER NOT NULL,
        UNIQUE (topic_id, name)
    ) STRICT;
    CREATE TABLE watermark (
        subscription_id INTEGER NOT NULL REFERENCES subscription,
        lane            INTEGER NOT NULL,
        offset          INTEGER NOT NULL,
        settled         INTEGER NOT NULL,
        PRIMARY KEY (subscription_id, lane)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE dead_letter (
        dead_letter_id  INTEGER PRIMARY KEY,
        subscription_id INTEGER NOT NULL REFERENCES subscription,
        offset          INTEGER NOT NULL,
        id              BLOB NOT NULL,
        key             TEXT,
        headers         TEXT,
        body            BLOB NOT NULL,
        reason          TEXT NOT NULL,
        attempts        INTEGER NOT NULL,
        died_at_us      INTEGER NOT NULL,
        UNIQUE (subscription_id, offset)
    ) STRICT;
    """,
)

# A topic's messages have a table of their own: a reader scans it by offset, and rows of
# other topics would be in its way.
_MESSAGE_TABLE: Final = """
    CREATE TABLE message_{topic_id} (
        offset    INTEGER PRIMARY KEY,
        lane      INTEGER NOT NULL,
        id        BLOB NOT NULL,
        key       TEXT,
        headers   TEXT,
        body      BLOB NOT NULL,
        stored_at_us INTEGER NOT NULL
    ) STRICT
"""

# Up to where every subscription of a topic is done. Without one nothing is: the log waits
# for its first reader.
_DONE: Final = """
    SELECT coalesce(min(w.offset), 0)
    FROM subscription s JOIN watermark w USING (subscription_id) WHERE s.topic_id = ?
"""

_DEFAULT_LANES: Final = 16
_DEFAULT_MAX_OPEN: Final = 10_000


@final
class FileOptions:
    """The options of one URL."""

    def __init__(self, url: BrokerURL) -> None:
        url.check_options((*OPTIONS, *COMMON_OPTIONS))
        self.lanes = url.option("lanes", _lanes_option, None)
        self.capacity = url.option("capacity", positive_integer, None)
        self.start = url.option("start", one_of("earliest", "latest"), "earliest")
        self.max_open = url.option("max_open", positive_integer, _DEFAULT_MAX_OPEN)
        commit = url.option("commit", one_of("auto", "loop", "thread"), "auto")
        self.commit = cast(CommitOn, commit)
        self.vfs = url.options.get("vfs")


@final
class QueueFile:
    """A queue file being opened; closed again unless ``keep`` was called."""

    def __init__(self, url: BrokerURL, options: FileOptions) -> None:
        self._url = url
        self._options = options
        self.path: Final = url.file()
        self._kept = False
        self.connection: Final = self.open()
        # Creating a topic may wait for a sender; nothing else of ours runs meanwhile.
        self.connection.set_busy_timeout(5_000)

    def __enter__(self) -> "QueueFile":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.connection.close()

    def keep(self) -> apsw.Connection:
        """Leave the connection to the caller, who closes it."""
        self._kept = True
        self.connection.set_busy_timeout(0)
        return self.connection

    def open(self) -> apsw.Connection:
        """Open one more connection to the file."""
        url, path = self._url, self.path
        if url.create == "never" and not path.exists():
            raise TopicNotFoundError(f"{path}: the queue is missing, and create=never was asked")
        if not path.parent.is_dir():
            raise UnavailableError(f"{path}: the folder {path.parent} does not exist; make it")
        try:
            return open_sqlite(
                path,
                kind="queue",
                application_id=_APPLICATION_ID,
                migrations=_MIGRATIONS,
                vfs=self._options.vfs,
            )
        except UnusableFileError as error:
            raise UnavailableError(str(error)) from error
        except SQLiteFileError as error:
            raise IncompatibleBrokerError(str(error)) from error

    def find_topic(self, clock: Clock) -> tuple[int, int]:
        """Return (id, number of lanes) of the topic, made if missing and allowed."""
        url, options = self._url, self._options
        if url.topic is None:
            raise InvalidURLError(f"{url}: names no topic; add ?topic=ratings")
        with translated():
            row = self._topic_row()
            if row is None:
                if url.create == "never":
                    raise TopicNotFoundError(
                        f"{self.path}: there is no topic {url.topic!r}, and create=never was asked"
                    )
                self._create_topic(url.topic, options.lanes or _DEFAULT_LANES, clock)
                row = self._topic_row()
                assert row is not None
        if options.lanes not in (None, row[1]):
            raise InvalidURLError(
                f"sqlite: lanes={options.lanes} is refused; topic {url.topic!r} was made with "
                f"{row[1]}, which cannot change"
            )
        return row

    def _topic_row(self) -> tuple[int, int] | None:
        sql = "SELECT topic_id, lanes FROM topic WHERE name = ?"
        return cast(
            "tuple[int, int] | None", self.connection.execute(sql, (self._url.topic,)).fetchone()
        )

    def _create_topic(self, name: str, lanes: int, clock: Clock) -> None:
        with transaction(self.connection):
            if self._topic_row() is not None:
                return  # another process was quicker
            self.connection.execute(
                "INSERT INTO topic (name, lanes, last_offset, created_at_us) VALUES (?, ?, 0, ?)",
                (name, lanes, clock.now_us()),
            )
            topic_id = self.connection.last_insert_rowid()
            self.connection.execute(_MESSAGE_TABLE.format(topic_id=topic_id))

    def find_subscription(self, topic_id: int, clock: Clock) -> int:
        """Return the id of the subscription, made if missing and allowed."""
        url = self._url
        if url.subscription is None:
            raise InvalidURLError(f"{url}: names no subscription; add &subscription=process")
        with translated():
            found = self._subscription_id(topic_id)
            if found is None:
                if url.create == "never":
                    raise TopicNotFoundError(
                        f"{self.path}: topic {url.topic!r} has no subscription "
                        f"{url.subscription!r}, and create=never was asked"
                    )
                with transaction(self.connection):
                    found = self._subscription_id(topic_id)
                    if found is None:
                        found = self._create_subscription(topic_id, clock)
        return found

    def _subscription_id(self, topic_id: int) -> int | None:
        sql = "SELECT subscription_id FROM subscription WHERE topic_id = ? AND name = ?"
        return cast(
            "int | None", self.connection.execute(sql, (topic_id, self._url.subscription)).get
        )

    def _create_subscription(self, topic_id: int, clock: Clock) -> int:
        connection = self.connection
        sql = "SELECT last_offset, lanes FROM topic WHERE topic_id = ?"
        start, lanes = cast("tuple[int, int]", connection.execute(sql, (topic_id,)).fetchone())
        if self._options.start == "earliest":
            first = connection.execute(f"SELECT min(offset) FROM message_{topic_id}").get
            if first is not None:
                start = first - 1
        connection.execute(
            "INSERT INTO subscription (topic_id, name, start_offset, created_at_us) "
            "VALUES (?, ?, ?, ?)",
            (topic_id, self._url.subscription, start, clock.now_us()),
        )
        subscription_id = connection.last_insert_rowid()
        connection.executemany(
            "INSERT INTO watermark VALUES (?, ?, ?, 0)",
            ((subscription_id, lane, start) for lane in range(lanes)),
        )
        return subscription_id


class SQLiteSide:
    """What both sides of a topic know about its file."""

    capabilities: Final = Capabilities(
        delivery="at-least-once",
        ordering="per-key",
        capacity="exact",
        survives=frozenset({"kill", "power"}),
        max_body_bytes=500_000_000,  # SQLITE_MAX_LENGTH is a row's, and rows carry more
    )

    def __init__(
        self, writer: SQLiteWriter, reads: apsw.Connection, topic_id: int, lanes: int
    ) -> None:
        self._writer = writer
        # Reads need no lock, but a connection of their own: the writer's may be inside a
        # transaction, in a thread that waits for another process.
        self._reads = reads
        self._topic_id = topic_id
        self._lanes = lanes
        self._table = f"message_{topic_id}"

    def _stat(self, clock: Clock) -> TopicStat:
        with _snapshot(self._reads):
            last = one(
                self._reads,
                "SELECT last_offset FROM topic WHERE topic_id = ?",
                (self._topic_id,),
            )
            rows = select(
                self._reads,
                """
                SELECT s.name, s.start_offset + sum(w.settled), min(w.offset), s.dead
                FROM subscription s JOIN watermark w USING (subscription_id)
                WHERE s.topic_id = ? GROUP BY s.subscription_id
                """,
                (self._topic_id,),
            )
            found = {}
            for name, settled, lowest, dead in rows:
                oldest = None
                if settled < last:
                    sql = (
                        f"SELECT stored_at_us FROM {self._table} WHERE offset > ? "
                        "ORDER BY offset LIMIT 1"
                    )
                    for (stored_at_us,) in select(self._reads, sql, (lowest,)):
                        oldest = max(0.0, (clock.now_us() - stored_at_us) / 1e6)
                found[name] = SubscriptionStat(last - settled, dead, oldest)
        return TopicStat(last, found)

    def _dead_letters(self, subscription: str, limit: int) -> list[DeadLetter]:
        rows = select(
            self._reads,
            """
            SELECT d.body, d.id, d.key, d.headers, d.reason, d.attempts, d.died_at_us
            FROM dead_letter d JOIN subscription s USING (subscription_id)
            WHERE s.topic_id = ? AND s.name = ? ORDER BY d.dead_letter_id LIMIT ?
            """,
            (self._topic_id, subscription, limit),
        )
        return [
            DeadLetter(message_of(id_, key, headers, body), reason, attempts, died_at_us)
            for body, id_, key, headers, reason, attempts, died_at_us in rows
        ]

    def _trim(self, connection: apsw.Connection, upto: int) -> None:
        # Looked up again, in this very transaction: a subscription that was made since the
        # caller looked begins with the oldest message there was.
        connection.execute(
            f"DELETE FROM {self._table} WHERE offset <= min(?, ({_DONE}))",
            (upto, self._topic_id),
        )

    def _trimmable(self, connection: apsw.Connection) -> tuple[int, int]:
        """Return (first offset kept, offset up to which every subscription is done)."""
        first = one(connection, f"SELECT coalesce(min(offset), 0) FROM {self._table}", ())
        return first, one(connection, _DONE, (self._topic_id,))


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Tell the caller what to do about SQLite's errors."""
    try:
        yield
    except BrokenFileError as error:
        raise BrokenBrokerError(str(error)) from error
    except SQLiteFileError as error:
        raise UnavailableError(str(error)) from error
    except apsw.Error as error:
        raise UnavailableError(f"the queue file cannot be read ({error})") from error
    except OSError as error:
        raise UnavailableError(f"the queue's folder cannot be used ({error})") from error


@contextlib.contextmanager
def _snapshot(connection: apsw.Connection) -> Iterator[None]:
    """Let several reads see one state of the file."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def select(
    connection: apsw.Connection, sql: str, bindings: tuple[object, ...]
) -> list[tuple[Any, ...]]:
    """Return all rows of a query. Their types are the schema's, which mypy cannot see."""
    return connection.execute(sql, cast("tuple[int, ...]", bindings)).fetchall()


def one(connection: apsw.Connection, sql: str, bindings: tuple[object, ...]) -> int:
    """Return the one number that a query gives."""
    return cast(int, connection.execute(sql, cast("tuple[int, ...]", bindings)).get)


def message_of(id_: bytes, key: str | None, headers: str | None, body: bytes) -> Message:
    return Message(body, id_, key, NO_HEADERS if headers is None else json.loads(headers))


def _lanes_option(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LANES:
        raise ValueError(f"1 to {MAX_LANES} is accepted")
    return int(text)
