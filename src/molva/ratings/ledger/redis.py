"""Redis ledger: counters, and the last ratings of each item, in a server's memory.

URL:
    ``redis://user:password@host:6379/0``

    ``rediss://``
        The same over TLS. The server's certificate must be made out to the host's name.
    ``horizon``
        Seconds that ids are remembered. Default 259,200, three days; at least 90,000.
    ``prefix``
        What all keys begin with. Default ``molva``. Several deployments may share a server.
    ``ca``
        File of the authorities that a server's certificate is checked against (TLS).

    Name and password may stand in ``MOLVA_REDIS_USERNAME`` and ``MOLVA_REDIS_PASSWORD``.

Durability:
    Asked of the server when it is opened: kill and power with ``appendonly yes`` and
    ``appendfsync always``, else less (``_base.redis_server``). Never ``node``: replication is
    asynchronous, and a replica that takes over may lack what was confirmed. A server that
    may evict keys is refused: an evicted id is a rating counted twice.

What is kept:
    Counters for ever. Of each item and of each campaign the last 10,000 ratings, of each
    campaign the last 10,000 entries: so far back any last n, any ``as_of``, corrections. What
    would need more is refused (``LedgerUnsupportedError``), never guessed. A trusted total
    at an ``as_of`` from before a correction is refused, because corrections are folded into
    what is kept. There is no history to rebuild from.

    Ids for ``horizon`` seconds, in five hashes by time that expire as a whole: about a
    hundred bytes a rating. An id that comes again later counts again, so the horizon must be
    longer than anything may come again: redelivery, retries of clients, a spool. An id
    is of its campaign: the same one in another campaign is another rating.

Design:
    A campaign's part of a batch is one call of one function (``_redis.lua``): ids, window,
    counters and ``as_of`` change together or not at all. Other clients never see half of it,
    and a client that dies between two calls leaves nothing half done, because there are no
    two. A batch of several campaigns is a call for each, sent together.

    A ring of running sums makes the sum of any last n two look-ups. It is one string for
    each scope, so appending a batch is one SETRANGE, and a full one takes 140 KB.

    Rejected: a list of rates to be added up at each read (a millisecond of the only thread
    for 10,000); SADD and HINCRBY in a pipeline (a kill in between loses the rating for
    good, since its id is known); one set of ids (it grows for ever); forgetting ids by
    number instead of time (then nobody can say when a redelivery counts twice).
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Final, final
from urllib.parse import quote

import msgspec
from redis.exceptions import ResponseError

from molva._base.redis_server import (
    FunctionLibrary,
    MisconfiguredServerError,
    RedisAddress,
    RedisLink,
    RedisServerError,
    ServerFacts,
    UnusableServerError,
    probe,
)
from molva._base.url import ResourceURL, positive_integer
from molva.ratings.ledger._content import KIND_OF, content_hash, text_of
from molva.ratings.ledger._redis_audit import differences
from molva.ratings.ledger._refusals import check_submission
from molva.ratings.ledger._schema import KINDS, RATING
from molva.ratings.ledger.protocol import (
    Difference,
    LedgerCapabilities,
    LedgerEntry,
    LedgerError,
    LedgerServerError,
    LedgerSize,
    LedgerUnavailableError,
    LedgerUnsupportedError,
    LedgerURLError,
    Outcome,
    Total,
)
from molva.ratings.rating import Change, Rating, Submission

__all__ = ["BEST", "HourlyCount", "RedisLedger"]

_logger: Final = logging.getLogger("molva.ratings")

# Ratings of an item and of a campaign, and entries of a campaign, that are kept one by one.
# A ring takes 14 bytes each; twice as many, and 1,000 items take 280 MB instead of 140.
_WINDOW: Final = 10_000

# Seconds that ids are remembered: a weekend without a worker.
_HORIZON: Final = 259_200
# The shortest that is accepted: a day for which workers may be down between a rating's first
# delivery and its second, an hour for which clients try again. There is no spool.
_SHORTEST_HORIZON: Final = 86_400 + 3_600

# What a ledger in Redis can do at best: the server's settings decide what is survived.
BEST: Final = LedgerCapabilities(
    survives=frozenset({"kill", "power"}),
    history=False,
    window=_WINDOW,
    horizon_seconds=float(_HORIZON),
    ids="campaign",
)

# The library's text. Loaded into a server that turns out not to have it.
_LIBRARY: Final = FunctionLibrary(
    "molva_ledger", (files("molva.ratings.ledger") / "_redis.lua").read_text()
)

# Entries that one call reads.
_ENTRIES_A_PAGE: Final = 1_000
# Seconds for which a call may hold up the server, beyond what it has anyway: a batch of
# 1,000 takes some 10 ms.
_PATIENCE: Final = 4.0

# Seconds that a read may take at most, its turn included. Somebody waits for the answer.
_READ_TIMEOUT: Final = 5.0

_OUTCOMES: Final = {
    ord("A"): Outcome.APPLIED,
    ord("D"): Outcome.DUPLICATE,
    ord("C"): Outcome.CONFLICT,
    ord("N"): Outcome.NO_RATING,
    ord("E"): Outcome.NO_EFFECT,
}
_TOO_OLD: Final = ord("O")

# A submission's head: SUBMISSION in _redis.lua.
_SUBMISSION: Final = struct.Struct(">16sBi8sHHI")
# An entry as the log keeps it: LOG in _redis.lua, then the item, then ``_Words``.
_LOG: Final = struct.Struct(">" + "6s" * 4 + "iBH")


@final
class _Words(msgspec.Struct, array_like=True, frozen=True):
    """What the server keeps of an entry without looking into it."""

    id: bytes | None
    text: str | None
    accepted_at_us: int
    applied_at_us: int


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_words: Final = msgspec.msgpack.Decoder(_Words).decode


@final
@dataclass(frozen=True, slots=True)
class HourlyCount:
    """The ratings that were applied in one hour.

    Attributes:
        hour: Hours since 1970, UTC.
        count: How many.
        sum: Sum of their rates, as they were first given.
    """

    hour: int
    count: int
    sum: int


@final
class RedisLedger:
    """A ledger in a Redis server. See ``Ledger`` for what each method promises."""

    def __init__(
        self,
        address: RedisAddress,
        facts: ServerFacts,
        *,
        writing: RedisLink,
        reading: RedisLink,
        prefix: str,
        horizon: int,
    ) -> None:
        self._address = address
        self._writing = writing
        self._reading = reading
        self._prefix = prefix
        self._horizon = horizon
        self._turn = asyncio.Lock()
        self._closed = False
        self._named: set[str] = set()
        self.capabilities: Final = replace(
            BEST, survives=facts.survives, horizon_seconds=float(horizon)
        )

    @classmethod
    async def open(cls, url: ResourceURL) -> "RedisLedger":
        """Return the ledger that ``url`` names; there is nothing to be made.

        Raises:
            LedgerURLError: The server will not have us, or an option is refused.
            LedgerServerError: It is too old, or would throw away what it should keep.
            LedgerUnavailableError: It cannot be reached now.
        """
        horizon = url.option("horizon", _horizon, _HORIZON)
        prefix = url.option("prefix", _prefix, "molva")
        address = RedisAddress.of(url)
        writing, reading = RedisLink(address, _LIBRARY), RedisLink(address, _LIBRARY)
        try:
            with _translated(address, opening=True):
                facts = await probe(writing, address, expiring=True)
        except BaseException:
            await writing.close()
            raise
        _logger.info("%s: ids are remembered for %s s", address, f"{horizon:,}")
        return cls(address, facts, writing=writing, reading=reading, prefix=prefix, horizon=horizon)

    # --------------------------------------------------------------- writing

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        """Apply a batch, each campaign's part of it as a whole. See ``Ledger.apply``."""
        self._check_open()
        outcomes: list[Outcome | Exception | None] = [None] * len(batch)
        parts: dict[str, list[int]] = {}
        words: list[bytes] = []
        for at, submission in enumerate(batch):
            try:
                check_submission(submission)
                words.append(_submission(submission, applied_at_us))
            except (ValueError, TypeError) as error:
                outcomes[at] = error
                words.append(b"")
            else:
                parts.setdefault(submission.entry.campaign, []).append(at)
        replies = await self._apply_parts(
            {campaign: [words[at] for at in places] for campaign, places in parts.items()},
            applied_at_us,
        )
        for places, letters in zip(parts.values(), replies, strict=True):
            for at, letter in zip(places, letters, strict=True):
                outcomes[at] = self._outcome(letter)
        return [outcome for outcome in outcomes if outcome is not None]

    async def _apply_parts(
        self, parts: Mapping[str, Sequence[bytes]], applied_at_us: int
    ) -> list[bytes]:
        """Apply each campaign's part; they travel together and share one fsync."""
        if not parts:
            return []
        # Before its first rating: a campaign that nobody lists would not be audited.
        names = [name for name in parts if name not in self._named]
        commands: list[tuple[object, ...]] = []
        if names:
            commands.append(("SADD", self._campaigns_key(), *names))
        for campaign, words in parts.items():
            key = self._key(campaign)
            commands.append(
                _LIBRARY.call("apply", [key], applied_at_us, _WINDOW, self._horizon, *words)
            )
        with _translated(self._address, opening=False):
            replies = await self._writing.call_many(commands, patience=_PATIENCE)
            for reply in replies:
                if isinstance(reply, Exception):
                    # Other parts may have been applied: their ids make trying again safe.
                    raise reply
        self._named.update(names)
        return replies[len(commands) - len(parts) :]

    def _outcome(self, letter: int) -> Outcome | Exception:
        if letter == _TOO_OLD:
            return LedgerUnsupportedError(
                f"it corrects a rating that is older than the last {_WINDOW:,} entries, which are "
                "all that Redis keeps one by one"
            )
        return _OUTCOMES[letter]

    async def rebuild(self) -> None:
        """Raise: what is left of the entries does not give the numbers."""
        raise LedgerUnsupportedError(
            f"{self._address}: Redis keeps counters and the last {_WINDOW:,} entries, so there is "
            "nothing to rebuild them from; a ledger in SQLite or PostgreSQL keeps all"
        )

    # --------------------------------------------------------------- reading

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        """Return the average of the last ``n`` at ``as_of``. See ``Ledger.total``."""
        if n < 1:
            raise ValueError(f"n={n} is refused: a window holds at least 1 rating")
        reply = await self._read(
            "total",
            campaign,
            "" if item is None else item,
            int(item is not None),
            min(n, 1 << 50),
            -1 if as_of is None else max(as_of, 0),
            int(trusted),
            _WINDOW,
        )
        if reply is None:
            return None
        if reply[0] == b"window":
            raise LedgerUnsupportedError(
                f"n={n}, as_of={as_of}: Redis keeps the last {_WINDOW:,} ratings of an item and of "
                "a campaign, and this reaches further back"
            )
        if reply[0] == b"corrected":
            raise LedgerUnsupportedError(
                f"as_of={as_of}: ratings were corrected since, and Redis keeps the corrected "
                "numbers only"
            )
        sum_, n, count, at, *pairs = reply
        found = dict(zip(pairs[::2], pairs[1::2], strict=True))
        return Total(
            sum=int(sum_),
            n=n,
            count=count,
            distribution={rate: found[rate] for rate in sorted(found)},
            as_of=at,
        )

    async def last_seq(self, campaign: str) -> int:
        """Return the campaign's last sequence number; 0 where it has no entry."""
        return int(await self._read_key("HGET", f"{self._key(campaign)}campaign", "seq") or 0)

    async def size(self) -> LedgerSize:
        """Return how much was ever counted, kept or not."""
        campaigns = entries = ratings = 0
        for campaign in await self._campaigns():
            seq, count = await self._read_key(
                "HMGET", f"{self._key(campaign)}campaign", "seq", "count"
            )
            if seq is not None:
                campaigns += 1
                entries += int(seq)
                ratings += int(count)
        return LedgerSize(campaigns, entries, ratings)

    async def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        """Yield the campaign's entries after ``since_seq`` in order, as they stand now."""
        upto: int | None = None
        since_seq = max(since_seq, 0)
        while upto is None or since_seq < upto:
            last, *page = await self._read("entries", campaign, since_seq, _ENTRIES_A_PAGE)
            upto = last if upto is None else upto
            if since_seq < upto and not page:
                raise LedgerUnsupportedError(
                    f"{campaign!r}: Redis keeps the last {_WINDOW:,} entries; begin after "
                    f"{last - _WINDOW:,}"
                )
            for packed in page:
                since_seq += 1
                if since_seq <= upto:
                    yield _entry(packed)

    async def by_hour(
        self, campaign: str, *, item: str | None = None, day: int
    ) -> list[HourlyCount]:
        """Return what was counted in each hour of one day, of those that had any.

        Args:
            campaign: Name of the campaign.
            item: One item of it; None for all.
            day: Days since 1970, UTC. Kept for 92 days.
        """
        suffix = "" if item is None else f"/{item}"
        names = [f"{hour}/{what}{suffix}" for hour in range(24) for what in "ns"]
        values = await self._read_key("HMGET", f"{self._key(campaign)}hours:{day}", *names)
        numbers = [int(value or 0) for value in values]
        return [
            HourlyCount(day * 24 + hour, numbers[2 * hour], numbers[2 * hour + 1])
            for hour in range(24)
            if numbers[2 * hour]
        ]

    async def verify(self) -> AsyncIterator[Difference]:
        """Compare what is kept twice: counters, rings, distributions, the log's end.

        What is no longer kept cannot be recomputed; a counter that is wrong by as much as
        everything that came after it is not found.
        """
        for campaign in await self._campaigns():
            items = [""]
            items += [
                f":{item.decode()}"
                for item in await self._read_key("HKEYS", f"{self._key(campaign)}items")
            ]
            for scope in items:
                kept = await self._read("audit", campaign, scope)
                for difference in differences(campaign, scope, kept, _WINDOW):
                    yield difference

    # ------------------------------------------------------------ the way there

    async def _campaigns(self) -> list[str]:
        return sorted(
            name.decode() for name in await self._read_key("SMEMBERS", self._campaigns_key())
        )

    async def _read(self, function: str, campaign: str, *arguments: object) -> Any:
        return await self._read_key(*_LIBRARY.call(function, [self._key(campaign)], *arguments))

    async def _read_key(self, *command: Any) -> Any:
        self._check_open()
        try:
            # In our own line, so that whoever gives up leaves it: a server that answers
            # nothing would else collect readers for as long as it is away.
            async with asyncio.timeout(_READ_TIMEOUT), self._turn:
                with _translated(self._address, opening=False):
                    return await self._reading.call(*command)
        except TimeoutError as error:
            raise LedgerUnavailableError(
                f"{self._address}: no answer within {_READ_TIMEOUT:g} s"
            ) from error

    def _key(self, campaign: str) -> str:
        # Quoted: a brace in the name would end the hash tag.
        return f"{self._prefix}:{{{quote(campaign, safe='')}}}:"

    def _campaigns_key(self) -> str:
        return f"{self._prefix}:campaigns"

    def _check_open(self) -> None:
        if self._closed:
            raise LedgerError(f"{self._address}: the ledger is closed")

    async def close(self) -> None:
        """Close the connections. Idempotent."""
        self._closed = True
        await self._writing.close()
        await self._reading.close()


def _submission(submission: Submission, applied_at_us: int) -> bytes:
    """Return a submission as ``apply`` in _redis.lua takes it."""
    id_, entry = submission
    text = text_of(entry)
    item = target = comment = b""
    if isinstance(entry, Rating):
        item = entry.item.encode()
        body = _encode(_Words(id_, None, entry.accepted_at_us, applied_at_us))
        if text is not None:
            comment = _encode(_Words(None, text, entry.accepted_at_us, applied_at_us))
    else:
        target = entry.rating_id
        body = _encode(_Words(id_, text, entry.accepted_at_us, applied_at_us))
    head = _SUBMISSION.pack(
        id_,
        KIND_OF[type(entry)],
        entry.rate if isinstance(entry, Rating | Change) else 0,
        content_hash(entry),
        len(item),
        len(target),
        len(body),
    )
    return b"".join((head, item, target, body, comment))


def _entry(packed: bytes) -> LedgerEntry:
    *numbers, rate, kind, item_bytes = _LOG.unpack_from(packed)
    seq, campaign_position, position, target_seq = (int.from_bytes(n, "big") for n in numbers)
    at = _LOG.size + item_bytes
    words = _decode_words(packed[at:])
    is_rating = kind == RATING
    return LedgerEntry(
        seq=seq,
        kind=KINDS[kind],
        id=words.id,
        item=packed[_LOG.size : at].decode() if is_rating else None,
        rate=rate if is_rating or KINDS[kind] == "change" else None,
        target_seq=None if is_rating else target_seq,
        position=position if is_rating else None,
        campaign_position=campaign_position,
        text=words.text,
        accepted_at_us=words.accepted_at_us,
        applied_at_us=words.applied_at_us,
    )


def _horizon(text: str) -> int:
    seconds = positive_integer(text)
    if seconds < _SHORTEST_HORIZON:
        raise ValueError(
            f"at least {_SHORTEST_HORIZON:,} seconds are accepted: a rating may come again for a "
            "day, and clients try again for an hour"
        )
    return seconds


def _prefix(text: str) -> str:
    if not text or "{" in text or "}" in text:
        raise ValueError("a text without braces is accepted")
    return text


@contextlib.contextmanager
def _translated(address: RedisAddress, *, opening: bool) -> Iterator[None]:
    """Raise what the server's errors mean to whoever uses a ledger."""
    try:
        yield
    except MisconfiguredServerError as error:
        # A server that let us in once is expected to do so again.
        raise (LedgerURLError if opening else LedgerUnavailableError)(str(error)) from error
    except UnusableServerError as error:
        raise LedgerServerError(str(error)) from error
    except RedisServerError as error:
        raise LedgerUnavailableError(str(error)) from error
    except ResponseError as error:
        # Nothing was written: the functions read before they write.
        raise LedgerUnavailableError(f"{address}: {error}") from error
