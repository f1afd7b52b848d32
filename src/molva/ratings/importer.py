"""Sending the rows of a CSV file as ratings, over HTTP, so that repeating it is safe.

Each row gets an id made from all that was read up to and including it: the same file, sent
again, has the same ids, and every rating counts once. A file that has grown since has the
same ids for its old rows and new ones for the rest. The id begins with a digest of the
first row and then the row's number, so ids of one file are neighbours in the ledger.

An item's rows stay on one connection and each waits for its 2xx, so their order is kept.
Whatever is neither a 2xx nor a refusal (a reset, a time-out, a 5xx, a "later" such as 429)
leaves open whether the rating was stored, and the row is sent again with its id until it is.
"""

import csv
import gzip
import hashlib
import http.client
import io
import json
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, cast, final
from urllib.parse import urlencode, urlsplit

from molva._base.ids import format_id, stamp_uuid8
from molva._base.redaction import redact

__all__ = ["Columns", "ImportFailedError", "ImportReport", "Importer", "Row", "read_rows"]

# Rows that wait for each connection: enough that none runs dry, few enough that an import
# of any size needs little memory.
_WAITING: Final = 64
# Seconds that a request may take before it counts as lost.
_TIMEOUT: Final = 30.0
# Seconds before a lost request is sent again: at first, and at most.
_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
# Seconds at most for which a Retry-After is obeyed.
_LONGEST_RETRY_AFTER: Final = 60.0
# Refusals of the moment, not of the row: Request Timeout, Too Early, Too Many Requests.
_LATER: Final = frozenset({408, 425, 429})
# Seconds between two looks of a waiting thread at whether to stop.
_LOOK_INTERVAL: Final = 0.2
# Seconds that all threads together get to stop. One may be in the middle of a request;
# whoever pressed Ctrl-C waits no longer, and repeating the import settles that row.
_STOP_SECONDS: Final = 0.5
# Refusals that are kept to be shown; all are counted.
_SHOWN_REFUSALS: Final = 10


@final
class ImportFailedError(Exception):
    """The import cannot go on. What was stored is stored; repeating it is safe.

    ``unreachable``: the service did not answer, so the same command may work later.
    """

    def __init__(self, text: str, *, unreachable: bool = False) -> None:
        super().__init__(text)
        self.unreachable = unreachable


@final
@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of the file hold what; None where there is none."""

    rate: str
    item: str | None = None
    comment: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Row:
    """One rating to send. ``number`` counts rows from 1, without the header."""

    number: int
    id: bytes
    rate: str
    item: str
    comment: str
    position: int  # bytes of the file behind this row, for the progress bar


@final
@dataclass(slots=True)
class ImportReport:
    """What an import has done so far."""

    stored: int = 0
    refused: int = 0
    repeated: int = 0
    refusals: list[str] = field(default_factory=list)


def read_rows(path: Path, columns: Columns, *, campaign: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, plain or gzip, UTF-8, with a header.

    Raises:
        ImportFailedError: No such file or column, or no CSV in UTF-8.
    """
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if is_gzip else raw)
        try:
            reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
            _check_columns(path, columns, reader.fieldnames)
            yield from _rows(reader, columns, campaign, raw)
        except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ImportFailedError(f"{path}: is no CSV in UTF-8 ({error})") from error


def _check_columns(path: Path, columns: Columns, found: object) -> None:
    names = list(found) if isinstance(found, list) else []
    for option, name in (
        ("--rate-column", columns.rate),
        ("--item-column", columns.item),
        ("--comment-column", columns.comment),
    ):
        if name is not None and name not in names:
            raise ImportFailedError(
                f"{path}: has no column {name!r}; {option} takes one of {', '.join(names)}"
            )


def _rows(
    reader: "csv.DictReader[str]", columns: Columns, campaign: str, raw: IO[bytes]
) -> Iterator[Row]:
    chain = hashlib.blake2b(
        repr((campaign, columns.rate, columns.item, columns.comment)).encode(), digest_size=16
    )
    prefix = b""
    for number, row in enumerate(reader, 1):
        chain.update(repr(list(row.items())).encode())
        digest = chain.digest()
        prefix = prefix or digest[:5]
        yield Row(
            number=number,
            id=_row_id(prefix, number, digest),
            rate=(row[columns.rate] or "").strip(),
            item=(row[columns.item] or "") if columns.item else "",
            comment=(row[columns.comment] or "") if columns.comment else "",
            position=raw.tell(),
        )


def _row_id(prefix: bytes, number: int, digest: bytes) -> bytes:
    """Return the row's id: 5 bytes of the file, 4 of the number, 7 of all up to the row.

    The version and variant bits of a UUID would fall on the number, so that two rows
    could share it; these bytes are left out of it.
    """
    counted = number.to_bytes(4, "big")
    return stamp_uuid8(
        prefix + counted[:1] + b"\0" + counted[1:2] + b"\0" + counted[2:] + digest[:5]
    )


@final
class Importer:
    """Sends rows over some connections.

    Args:
        url: Where the service is: ``http://127.0.0.1:8081``.
        campaign: The campaign that all rows belong to.
        connections: How many to use; rows of one item share one.
        patience: Seconds without any success after which the import gives up.
    """

    def __init__(self, url: str, *, campaign: str, connections: int, patience: float) -> None:
        self._https, self._host, self._port, self._path = _parse_url(url)
        self._campaign = campaign
        self._patience = patience
        self._queues: list[queue.Queue[Row | None]] = [
            queue.Queue(_WAITING) for _ in range(connections)
        ]
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._last_success = time.monotonic()
        self._stop = threading.Event()
        self.report: Final = ImportReport()

    def run(self, rows: Iterator[Row], on_progress: Callable[[Row], None]) -> ImportReport:
        """Send all rows; return when each has its answer.

        Args:
            rows: What to send.
            on_progress: Called in this thread with each row as it is taken up.

        Raises:
            ImportFailedError: The service did not answer for ``patience`` seconds, or the
                file could not be read further.
        """
        threads = [
            threading.Thread(target=self._send_all, args=(rows_of,), daemon=True)
            for rows_of in self._queues
        ]
        try:
            for thread in threads:
                thread.start()
            for row in rows:
                on_progress(row)
                line = zlib.crc32(row.item.encode()) % len(self._queues)
                self._put(self._queues[line], row)
            for rows_of in self._queues:
                self._put(rows_of, None)
            for thread in threads:
                while thread.is_alive() and not self._stop.is_set():
                    thread.join(_LOOK_INTERVAL)
        finally:
            # Where all went well, the threads have ended already.
            self._stop.set()
            deadline = time.monotonic() + _STOP_SECONDS
            for thread in threads:
                if thread.is_alive():
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._failure is not None:
            raise self._failure
        return self.report

    def _put(self, rows_of: "queue.Queue[Row | None]", row: Row | None) -> None:
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                rows_of.put(row, timeout=_LOOK_INTERVAL)
            except queue.Full:
                continue
            return

    def _send_all(self, rows_of: "queue.Queue[Row | None]") -> None:
        connection: http.client.HTTPConnection | None = None
        try:
            while not self._stop.is_set():
                try:
                    row = rows_of.get(timeout=_LOOK_INTERVAL)
                except queue.Empty:
                    continue
                if row is None:
                    return
                connection = self._send_until_answered(connection, row)
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            self._failure = self._failure or error
            self._stop.set()
        finally:
            if connection is not None:
                connection.close()

    def _send_until_answered(
        self, connection: http.client.HTTPConnection | None, row: Row
    ) -> http.client.HTTPConnection | None:
        pause = _FIRST_PAUSE
        while not self._stop.is_set():
            problem: object
            try:
                connection = connection or self._connect()
                status, body, wait = self._post(connection, row)
            except (OSError, http.client.HTTPException) as error:
                problem, wait = error, 0.0
                if connection is not None:
                    connection.close()
                    connection = None
            else:
                if status < 500 and status not in _LATER:
                    self._count(row, status, body)
                    return connection
                problem = f"{status} {_detail(body)}"
            with self._lock:
                self.report.repeated += 1
                silent = time.monotonic() - self._last_success
            if silent > self._patience:
                raise ImportFailedError(
                    f"no row was stored for {silent:.0f} s ({problem}); run the same command "
                    "again to go on",
                    unreachable=True,
                )
            # Half the patience: one more try comes before it has run out.
            self._stop.wait(max(pause, min(wait, self._patience / 2, _LONGEST_RETRY_AFTER)))
            pause = min(_LONGEST_PAUSE, pause * 2)
        return connection

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=_TIMEOUT)

    def _post(self, connection: http.client.HTTPConnection, row: Row) -> tuple[int, bytes, float]:
        fields = {"campaign": self._campaign, "id": format_id(row.id), "rate": row.rate}
        if row.item:
            fields["item"] = row.item
        if row.comment:
            fields["comment"] = row.comment
        headers = {"content-type": "application/x-www-form-urlencoded"}
        connection.request("POST", self._path, urlencode(fields).encode(), headers)
        response = connection.getresponse()
        wait = response.headers.get("retry-after", "0")
        return response.status, response.read(), float(wait) if wait.isdecimal() else 0.0

    def _count(self, row: Row, status: int, body: bytes) -> None:
        report = self.report
        with self._lock:
            self._last_success = time.monotonic()
            if status == 404:
                raise ImportFailedError(_detail(body) or f"{self._path} is not there (404)")
            if 200 <= status < 300:
                report.stored += 1
                return
            report.refused += 1
            if len(report.refusals) < _SHOWN_REFUSALS:
                report.refusals.append(f"row {row.number}: {status} {_detail(body)}")


def _parse_url(url: str) -> tuple[bool, str, int, str]:
    """Return whether it is HTTPS, the host, the port and the path of ``/rate``."""
    # Without a scheme, what stands before an @ is a password just as well.
    shown = redact(url) if "://" in url else redact(f"http://{url}").removeprefix("http://")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImportFailedError(f"{shown!r} is no address of a service") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ImportFailedError(f"{shown!r} is no address of a service: http://127.0.0.1:8081")
    if parts.username is not None or parts.password is not None:
        raise ImportFailedError(
            f"{shown!r} holds a user or password, which would not be sent; leave them out"
        )
    https = parts.scheme == "https"
    return https, parts.hostname, port or (443 if https else 80), parts.path.rstrip("/") + "/rate"


def _detail(body: bytes) -> str:
    try:
        document = json.loads(body)
    except ValueError:
        return body[:80].decode("utf-8", "replace")
    return str(document.get("detail", "")) if isinstance(document, dict) else ""
