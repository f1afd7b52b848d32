"""The file behind the SQLite driver: its schema, its options, finding what a URL names."""

import contextlib
import json
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, cast, final
from zlib import crc32

import apsw

from molva._base.clock import Clock
from molva._base.ids import format_id
from molva._base.sqlite_file import (
    SQLiteFileError,
    UnusableFileError,
    open_sqlite,
    transaction,
)
from molva._base.sqlite_writer import BrokenFileError, CommitOn, SQLiteWriter
from molva._base.url import one_of, positive_integer, positive_number
from molva.messaging._lanes import MAX_LANES
from molva.messaging.driver import Capabilities, DeadLetter, SubscriptionStat, TopicStat
from molva.messaging.errors import (
    BrokenBrokerError,
    IncompatibleBrokerError,
    InvalidURLError,
    QueueNotFoundError,
    TopicNotFoundError,
    UnavailableError,
)
from molva.messaging.message import NO_HEADERS, Message
from molva.messaging.url import BrokerURL

__all__ = [
    "ORDERS",
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TAKE_OFFSETS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "DeadLetters",
    "FileOptions",
    "QueueFile",
    "SQLiteSide",
    "checksum_of",
    "facts",
    "headers_text",
    "is_damaged",
    "message_of",
    "one",
    "select",
    "translated",
    "watermark_sum",
]

TOPIC_OPTIONS: Final = ("lanes", "start", "max_open", "commit", "vfs")
QUEUE_OPTIONS: Final = ("lease", "commit", "vfs")

TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="per-key",
    capacity="exact",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=500_000_000,  # SQLITE_MAX_LENGTH is a row's, and rows carry more
)

QUEUE_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",  # "per-key" needs lanes that are owned: topics have them
    capacity="exact",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=500_000_000,
    holding="lease",
    disciplines=frozenset({"fifo", "lifo", "priority", "random"}),
    overflows=frozenset({"reject", "drop-oldest"}),
    delay=True,
    attempts="exact",
)

_APPLICATION_ID: Final = 0x4D4C_5651  # "MLVQ"

_VERSION_1: Final = """
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
"""


def _version_2(connection: apsw.Connection) -> None:
    """Queues; checksums; times to live; dead letters that can be sent back."""
    for (topic_id,) in connection.execute("SELECT topic_id FROM topic").fetchall():
        for column in ("ttl REAL", "only_for INTEGER", "checksum INTEGER"):
            connection.execute(f"ALTER TABLE message_{topic_id} ADD COLUMN {column}")
    connection.execute(
        """
        -- How many consumers have handed over messages of a lane since it last moved, and did
        -- not let go of it: those that died, and the one at work. ``_lanes`` says what for.
        ALTER TABLE watermark ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;

        CREATE TABLE queue (
            queue_id      INTEGER PRIMARY KEY,
            name          TEXT NOT NULL UNIQUE,
            discipline    TEXT NOT NULL,
            stored        INTEGER NOT NULL DEFAULT 0,
            settled       INTEGER NOT NULL DEFAULT 0,
            dropped       INTEGER NOT NULL DEFAULT 0,
            dead          INTEGER NOT NULL DEFAULT 0,
            created_at_us INTEGER NOT NULL
        ) STRICT;

        -- Leases run on the machine's monotonic clock, which begins anew with each boot.
        CREATE TABLE boot (
            only_row                INTEGER PRIMARY KEY CHECK (only_row = 1),
            boot_id                 TEXT NOT NULL,
            wall_minus_monotonic_us INTEGER NOT NULL
        ) STRICT;

        CREATE TABLE dead_letter_2 (
            dead_letter_id  INTEGER PRIMARY KEY,
            subscription_id INTEGER REFERENCES subscription,
            queue_id        INTEGER REFERENCES queue,
            offset          INTEGER NOT NULL,
            id              BLOB NOT NULL,
            key             TEXT,
            headers         TEXT,
            body            BLOB NOT NULL,
            priority        INTEGER NOT NULL DEFAULT 0,
            ttl             REAL,
            reason          TEXT NOT NULL,
            attempts        INTEGER NOT NULL,
            stored_at_us    INTEGER NOT NULL,
            died_at_us      INTEGER NOT NULL,
            CHECK ((subscription_id IS NULL) <> (queue_id IS NULL))
        ) STRICT;
        INSERT INTO dead_letter_2
            (dead_letter_id, subscription_id, offset, id, key, headers, body,
             reason, attempts, stored_at_us, died_at_us)
        SELECT dead_letter_id, subscription_id, offset, id, key, headers, body,
               reason, attempts, died_at_us, died_at_us
        FROM dead_letter;
        DROP TABLE dead_letter;
        ALTER TABLE dead_letter_2 RENAME TO dead_letter;
        CREATE UNIQUE INDEX dead_letter_of_subscription ON dead_letter (subscription_id, offset)
            WHERE subscription_id IS NOT NULL;
        CREATE UNIQUE INDEX dead_letter_of_queue ON dead_letter (queue_id, offset)
            WHERE queue_id IS NOT NULL;
        """
    )


_VERSION_3: Final = """
-- A flipped bit in a watermark would skip messages, or hand over old ones: any one of them
-- changes this sum. See ``watermark_sum``.
ALTER TABLE watermark ADD COLUMN sum INTEGER;
UPDATE watermark SET sum = offset + 3 * settled + 5 * deaths;
CREATE TRIGGER watermark_made AFTER INSERT ON watermark BEGIN
    UPDATE watermark SET sum = offset + 3 * settled + 5 * deaths
    WHERE subscription_id = NEW.subscription_id AND lane = NEW.lane;
END;
CREATE TRIGGER watermark_moved AFTER UPDATE OF offset, settled, deaths ON watermark BEGIN
    UPDATE watermark SET sum = offset + 3 * settled + 5 * deaths
    WHERE subscription_id = NEW.subscription_id AND lane = NEW.lane;
END;
-- ``checksum_of``; none in rows that are older than it.
ALTER TABLE dead_letter ADD COLUMN checksum INTEGER;
"""

_MIGRATIONS: Final = (_VERSION_1, _version_2, _VERSION_3)

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
        stored_at_us INTEGER NOT NULL,
        ttl       REAL,
        only_for  INTEGER,  -- a replayed message is one subscription's only
        checksum  INTEGER   -- ``checksum_of``; none in rows that are older than it
    ) STRICT
"""

TAKE_OFFSETS: Final = """
    UPDATE topic SET last_offset = last_offset + ? WHERE topic_id = ? RETURNING last_offset
"""

# How each discipline takes what is ready.
ORDERS: Final = {
    "fifo": "offset",
    "lifo": "offset DESC",
    "priority": "priority DESC, offset",
    "random": "place, offset",
}

# A queue's messages. ``state``: 0 ready, 1 held, 2 delayed. ``due_us``: when what is held or
# delayed becomes ready, on the machine's monotonic clock. ``turn`` counts every hand-over and
# is the token's epoch, ``attempt`` those that counted. ``place``: where chance has put it.
# The two indexes divide the rows, so that taking one never walks over those of the other.
_QUEUE_TABLE: Final = """
    CREATE TABLE queue_{queue_id} (
        offset    INTEGER PRIMARY KEY,
        id        BLOB NOT NULL,
        key       TEXT,
        headers   TEXT,
        body      BLOB NOT NULL,
        priority  INTEGER NOT NULL,
        ttl       REAL,
        checksum  INTEGER NOT NULL,
        stored_at_us INTEGER NOT NULL,
        state     INTEGER NOT NULL,
        due_us    INTEGER NOT NULL,
        turn      INTEGER NOT NULL DEFAULT 0,
        attempt   INTEGER NOT NULL DEFAULT 0,
        place     INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX queue_{queue_id}_ready ON queue_{queue_id} ({order}) WHERE state = 0;
    CREATE INDEX queue_{queue_id}_due ON queue_{queue_id} (due_us) WHERE state > 0;
"""

# Up to where every subscription of a topic is done. Without one nothing is: the log waits
# for its first reader.
_DONE: Final = """
    SELECT coalesce(min(w.offset), 0)
    FROM subscription s JOIN watermark w USING (subscription_id) WHERE s.topic_id = ?
"""

# Offset, lane or priority, an instant, time to live, owner.
_FACTS: Final = struct.Struct("<qqqdq")
# Set in a checksum that covers these too; earlier versions stored one of 32 bits.
_COVERS_FACTS: Final = 1 << 32

_DEFAULT_LANES: Final = 16
_DEFAULT_MAX_OPEN: Final = 10_000
_DEFAULT_LEASE: Final = 30.0


@final
class FileOptions:
    """The options of one URL."""

    def __init__(self, url: BrokerURL) -> None:
        url.check_driver_options(TOPIC_OPTIONS if url.queue is None else QUEUE_OPTIONS)
        self.lanes = url.option("lanes", _lanes_option, None)
        self.lease = url.option("lease", positive_number, _DEFAULT_LEASE)
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
        with translated(self.path):
            row = self._topic_row()
            if row is None:
                if url.create == "never":
                    raise TopicNotFoundError(
                        f"{self.path}: there is no topic {url.topic!r}, and create=never was asked"
                    )
                self._create_topic(url.topic, options.lanes or _DEFAULT_LANES, clock)
                row = self._topic_row()
                assert row is not None
            self._check_topic(*row)
        if options.lanes not in (None, row[1]):
            raise InvalidURLError(
                f"sqlite: lanes={options.lanes} is refused; topic {url.topic!r} was made with "
                f"{row[1]}, which cannot change"
            )
        return row

    def _check_topic(self, topic_id: int, lanes: int) -> None:
        """Raise where the topic's numbers contradict each other. Costs a few look-ups.

        Offsets are dense: the last message stored is the last one there, unless all of them
        were settled and deleted; and what is deleted was settled by everybody.
        """
        table = f"message_{topic_id}"
        sql = f"""
            SELECT t.last_offset, (SELECT min(offset) FROM {table}),
                   (SELECT max(offset) FROM {table}), ({_DONE}),
                   (SELECT count(*) FROM subscription WHERE topic_id = ?),
                   (SELECT count(*) FROM watermark JOIN subscription USING (subscription_id)
                    WHERE topic_id = ?),
                   (SELECT max(w.offset) FROM watermark w JOIN subscription USING (subscription_id)
                    WHERE topic_id = ?)
            FROM topic t WHERE topic_id = ?
        """
        # One statement sees one state of the file.
        [row] = select(self.connection, sql, (topic_id,) * 5)
        last, lowest, highest, done, readers, marks, furthest = row
        contradictions = {
            "its last offset is not that of its last message": highest not in (None, last),
            "messages are missing": lowest is None and readers and done < last,
            "its first messages are missing": lowest is not None and readers and lowest > done + 1,
            "its subscriptions have other lanes than it": marks != readers * lanes,
            "a subscription is beyond its end": (furthest or 0) > last,
        }
        for contradiction, holds in contradictions.items():
            if holds:
                raise IncompatibleBrokerError(
                    f"{self.path}: topic {self._url.topic!r} is damaged: {contradiction}, so the "
                    "disk or another program changed the file; restore it from a copy"
                )

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

    def find_queue(self, clock: Clock) -> tuple[int, str]:
        """Return (id, discipline) of the queue, made if missing and allowed."""
        url = self._url
        if url.queue is None:
            raise InvalidURLError(f"{url}: names no queue; add ?queue=mails")
        with translated(self.path):
            row = self._queue_row()
            if row is None:
                if url.create == "never":
                    raise QueueNotFoundError(
                        f"{self.path}: there is no queue {url.queue!r}, and create=never was asked"
                    )
                with transaction(self.connection):
                    row = self._queue_row() or self._create_queue(url.queue, clock)
            self._check_queue(row[0])
        if url.discipline not in (None, row[1]):
            raise InvalidURLError(
                f"sqlite: discipline={url.discipline} is refused; queue {url.queue!r} was made "
                f"with {row[1]}, which cannot change"
            )
        return row

    def _check_queue(self, queue_id: int) -> None:
        """Raise where the queue's counts are not those of its messages.

        Each index is counted: what is missing there never comes. 20 ms for 10⁶ messages.
        """
        table = f"queue_{queue_id}"
        sql = f"""
            SELECT stored, stored - settled, (SELECT count(*) FROM {table} WHERE state = 0)
                   + (SELECT count(*) FROM {table} WHERE state > 0),
                   (SELECT max(offset) FROM {table})
            FROM queue WHERE queue_id = ?
        """
        [(stored, pending, found, highest)] = select(self.connection, sql, (queue_id,))
        if pending != found or (highest or 0) > stored:
            raise IncompatibleBrokerError(
                f"{self.path}: queue {self._url.queue!r} is damaged: {pending:,} messages should "
                f"wait and {found:,} do, so the disk or another program changed the file; restore "
                "it from a copy"
            )

    def _queue_row(self) -> tuple[int, str] | None:
        sql = "SELECT queue_id, discipline FROM queue WHERE name = ?"
        return cast(
            "tuple[int, str] | None", self.connection.execute(sql, (self._url.queue,)).fetchone()
        )

    def _create_queue(self, name: str, clock: Clock) -> tuple[int, str]:
        discipline = self._url.discipline or "fifo"
        self.connection.execute(
            "INSERT INTO queue (name, discipline, created_at_us) VALUES (?, ?, ?)",
            (name, discipline, clock.now_us()),
        )
        queue_id = self.connection.last_insert_rowid()
        self.connection.execute(_QUEUE_TABLE.format(queue_id=queue_id, order=ORDERS[discipline]))
        return queue_id, discipline

    def find_subscription(self, topic_id: int, clock: Clock) -> int:
        """Return the id of the subscription, made if missing and allowed."""
        url = self._url
        if url.subscription is None:
            raise InvalidURLError(f"{url}: names no subscription; add &subscription=process")
        with translated(self.path):
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
            "INSERT INTO watermark (subscription_id, lane, offset, settled) VALUES (?, ?, ?, 0)",
            ((subscription_id, lane, start) for lane in range(lanes)),
        )
        return subscription_id


class SQLiteSide:
    """What both sides of a topic know about its file."""

    capabilities: Final = TOPIC_CAPABILITIES

    def __init__(
        self,
        writer: SQLiteWriter,
        reads: apsw.Connection,
        *,
        path: str,
        topic: str,
        topic_id: int,
        lanes: int,
    ) -> None:
        self._writer = writer
        self._path = path
        self._topic = topic
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

    def _dead_letters_of(self, subscription: str) -> "DeadLetters | None":
        rows = select(
            self._reads,
            "SELECT subscription_id FROM subscription WHERE topic_id = ? AND name = ?",
            (self._topic_id, subscription),
        )
        origin = f"topic {self._topic}, subscription {subscription}"
        return DeadLetters(self._path, "subscription_id", rows[0][0], origin) if rows else None

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
def translated(path: str | Path) -> Iterator[None]:
    """Tell the caller what to do about SQLite's errors; ``path``: the queue file."""
    try:
        yield
    except BrokenFileError as error:
        raise BrokenBrokerError(str(error)) from error
    except SQLiteFileError as error:
        raise UnavailableError(str(error)) from error
    except (apsw.CorruptError, apsw.NotADBError, UnicodeDecodeError) as error:
        raise IncompatibleBrokerError(
            f"{path}: the queue is damaged ({error}); restore it from a copy"
        ) from error
    except apsw.Error as error:
        raise UnavailableError(f"{path}: the queue cannot be used now ({error})") from error
    except OSError as error:
        raise UnavailableError(
            f"{path}: the queue's folder cannot be used now ({error})"
        ) from error


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


def headers_text(message: Message) -> str | None:
    """Return a message's headers as they are stored."""
    return json.dumps(dict(message.headers)) if message.headers else None


def watermark_sum(offset: int, settled: int, deaths: int) -> int:
    """Return what is kept beside a watermark to find a flipped bit."""
    return offset + 3 * settled + 5 * deaths


def facts(offset: int, place: int, at_us: int, ttl: float | None, owner: int | None) -> bytes:
    """Return what a message's checksum covers beside the message.

    Args:
        offset: Where it stands; of a dead letter, how often it was tried.
        place: Its lane in a topic, its priority elsewhere.
        at_us: When it was stored; of a dead letter, when it died.
        ttl: Its time to live.
        owner: The only subscription that it is for.
    """
    try:
        return _FACTS.pack(offset, place, at_us, -1.0 if ttl is None else ttl, owner or 0)
    except struct.error:
        return b"of another type than was ever written"


def checksum_of(
    id_: bytes, key: str | None, headers: str | None, body: bytes, more: bytes = b""
) -> int:
    """Return what is stored beside a message to find a flipped bit: SQLite looks for none.

    Without ``more``, which are ``facts``, it is the one that earlier versions stored.
    """
    found = crc32(body, crc32(id_))
    if key is not None:
        found = crc32(key.encode(), found)
    if headers is not None:
        found = crc32(headers.encode(), found)
    return crc32(more, found) | _COVERS_FACTS if more else found


def is_damaged(
    checksum: int | None, id_: bytes, key: str | None, headers: str | None, body: bytes, more: bytes
) -> bool:
    """Return whether a row is not what was stored."""
    if checksum is None:
        return False
    try:
        return checksum != checksum_of(id_, key, headers, body, more if checksum >> 32 else b"")
    except TypeError:
        return True  # a NULL where none was ever written


def message_of(
    place: str,
    id_: bytes,
    key: str | None,
    headers: str | None,
    body: bytes,
    checksum: int | None,
    ttl: float | None = None,
    priority: int = 0,
    *,
    more: bytes = b"",
) -> Message:
    """Return the message of a row; ``place`` says which, for an error message.

    Raises:
        IncompatibleBrokerError: It is not what was stored.
    """
    if is_damaged(checksum, id_, key, headers, body, more):
        raise IncompatibleBrokerError(
            f"{place} is damaged: its checksum is wrong, so the disk or another program changed "
            f"it (message {format_id(id_)}); restore the file from a copy, or purge what waits"
        )
    if headers is None and ttl is None and not priority:
        return Message(body, id_, key)
    given = NO_HEADERS if headers is None else _headers_of(place, id_, headers)
    return Message(body, id_, key, given, priority, ttl=ttl)


def _headers_of(place: str, id_: bytes, text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} instead of an object")
    except ValueError as error:
        raise IncompatibleBrokerError(
            f"{place} is damaged: its headers cannot be read ({error}), so the disk or another "
            f"program changed it (message {format_id(id_)}); restore the file from a copy, or "
            "purge what waits"
        ) from error
    return found


@final
class DeadLetters:
    """The dead letters of one subscription or queue.

    Args:
        path: The queue file.
        column: ``subscription_id`` or ``queue_id``.
        owner: Its value.
        origin: What dead letters say of where they waited.
    """

    def __init__(self, path: str | Path, column: str, owner: int, origin: str) -> None:
        self._path = path
        self._rows = f"""
            SELECT dead_letter_id, id, key, headers, body, checksum, ttl, priority,
                   reason, attempts, died_at_us, stored_at_us
            FROM dead_letter WHERE {column} = ? ORDER BY dead_letter_id LIMIT ?
        """
        self._table = column.removesuffix("_id")
        self._column = column
        self.owner: Final = owner
        self._origin = origin

    def look(self, reads: apsw.Connection, limit: int) -> list[DeadLetter]:
        """Return the oldest ones."""
        with _snapshot(reads):
            rows = select(reads, self._rows, (self.owner, limit))
            sql = f"SELECT dead FROM {self._table} WHERE {self._column} = ?"
            number = one(reads, sql, (self.owner,))
        if len(rows) < min(limit, number):
            raise IncompatibleBrokerError(
                f"{self._path}: {self._origin} is damaged: it has {number:,} dead letters and "
                f"{len(rows):,} are found, so the disk or another program changed the file; "
                "restore it from a copy"
            )
        return [self._letter(row) for row in rows]

    def _letter(self, row: tuple[Any, ...]) -> DeadLetter:
        number, *message, reason, attempts, died, stored = row
        id_, key, headers, body, checksum, ttl, priority = message
        place = f"{self._path}: dead letter {number} of {self._origin}"
        more = _facts_of_letter(attempts, priority, died, ttl, stored, reason)
        found = message_of(place, id_, key, headers, body, checksum, ttl, priority, more=more)
        return DeadLetter(found, reason, attempts, died, self._origin, stored)

    def bury(
        self, connection: apsw.Connection, source: str, rows: Collection[tuple[str, int, int, int]]
    ) -> None:
        """Copy rows of ``source`` here: (reason, attempts, died_at_us, offset) of each.

        One that a crash brings here twice is kept once.
        """
        before = connection.total_changes()
        priority = "priority" if self._table == "queue" else "0"
        sql = f"""
            SELECT id, key, headers, body, {priority}, ttl, stored_at_us FROM {source}
            WHERE offset = ?
        """
        for reason, attempts, died, offset in rows:
            for row in select(connection, sql, (offset,)):
                id_, key, headers, body, priority_, ttl, stored = row
                more = _facts_of_letter(attempts, priority_, died, ttl, stored, reason)
                checksum = checksum_of(id_, key, headers, body, more)
                connection.execute(
                    f"""
                    INSERT OR IGNORE INTO dead_letter
                        ({self._column}, reason, attempts, died_at_us, offset, id, key, headers,
                         body, priority, ttl, stored_at_us, checksum)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                    """,
                    (self.owner, reason, attempts, died, offset, *row, checksum),
                )
        # Counted as they come: counting them anew takes longer the more there are.
        self.count(connection, connection.total_changes() - before)

    def chosen(
        self, connection: apsw.Connection, ids: Collection[bytes] | None, limit: int
    ) -> list[tuple[Any, ...]]:
        """Return (dead_letter_id, id, key, headers, body, ttl, priority) of what to replay.

        Raises:
            IncompatibleBrokerError: One of them is damaged.
        """
        if ids is None:
            rows = select(connection, self._rows, (self.owner, limit))
        else:
            wanted = frozenset(ids)
            every = select(connection, self._rows, (self.owner, -1))
            rows = [row for row in every if row[1] in wanted][:limit]
        for row in rows:
            self._letter(row)
        return [(*row[:5], *row[6:8]) for row in rows]

    def forget(self, connection: apsw.Connection, dead_letter_ids: Collection[int]) -> None:
        """Delete some."""
        connection.executemany(
            "DELETE FROM dead_letter WHERE dead_letter_id = ?", ((id_,) for id_ in dead_letter_ids)
        )
        self.count(connection, -len(dead_letter_ids))

    def forget_all(self, connection: apsw.Connection) -> int:
        """Delete all; return how many."""
        before = connection.total_changes()
        connection.execute(f"DELETE FROM dead_letter WHERE {self._column} = ?", (self.owner,))
        number = connection.total_changes() - before
        self.count(connection, -number)
        return number

    def count(self, connection: apsw.Connection, more: int) -> None:
        """Take note that there are so many more."""
        connection.execute(
            f"UPDATE {self._table} SET dead = dead + ? WHERE {self._column} = ?",
            (more, self.owner),
        )


def _facts_of_letter(
    attempts: int, priority: int, died: int, ttl: float | None, stored: int, reason: str
) -> bytes:
    return facts(attempts, priority, died, ttl, stored) + reason.encode()


def _lanes_option(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_LANES:
        raise ValueError(f"1 to {MAX_LANES} is accepted")
    return int(text)
