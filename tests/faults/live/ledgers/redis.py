"""A ledger in Redis: its keys as ``_redis.lua`` says them, read with plain commands.

It keeps the last ratings one by one. What is read here must be all of them, so runs start
the service with a window that holds a whole run (``launch``), and a log that is shorter
than its campaign's sequence is an error.
"""

import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import redis.asyncio

from tests.faults.live.ledgers.content import Content, Row, Running

__all__ = ["read_redis"]

# seq, campaign's position, item's, target's seq, rate, kind, bytes of the item; then the
# item, and (id, words, accepted, applied) in MessagePack.
_LOG: Final = struct.Struct(">6s6s6s6siBH")
_RATING: Final = 0
# seq, running sum; at position × 14 while no ring has come round.
_RECORD: Final = struct.Struct(">6sq")

_Totals = dict[tuple[str, str | None], tuple[int, int, dict[int, int]]]


async def read_redis(url: str) -> Content:
    """Return what ``redis://…?prefix=NAME`` holds."""
    parts = urlsplit(url)
    prefix = parse_qs(parts.query).get("prefix", ["molva"])[0]
    client = redis.asyncio.Redis.from_url(
        parts._replace(query="").geturl(), socket_timeout=10, protocol=2
    )
    rows: list[Row] = []
    totals: _Totals = {}
    known: set[tuple[str, bytes]] = set()
    try:
        keys = [key.decode() async for key in client.scan_iter(f"{prefix}:{{*", count=1_000)]
        names = {key.partition("{")[2].rpartition("}")[0] for key in keys}
        for name in sorted(names):
            campaign, start = unquote(name), f"{prefix}:{{{name}}}:"
            rows += await _rows(client, campaign, start)
            totals |= await _totals(client, campaign, start)
            for key in keys:
                if key.startswith(f"{start}ids:"):
                    known |= {(campaign, id_) for id_ in await _call(client, "HKEYS", key)}
    finally:
        await client.aclose()
    return Content(rows, totals, frozenset(known))


async def _rows(client: "redis.asyncio.Redis", campaign: str, start: str) -> list[Row]:
    log = await _call(client, "LRANGE", f"{start}log", 0, -1)
    seq = int(await _call(client, "HGET", f"{start}campaign", "seq") or 0)
    if len(log) != seq:
        raise AssertionError(f"{campaign} has {seq:,} entries, and {len(log):,} are in its log")
    rings: dict[str, bytes] = {}
    rows = []
    for packed in log:
        *numbers, rate, kind, length = _LOG.unpack_from(packed)
        found, of_campaign, of_item, _ = (int.from_bytes(number, "big") for number in numbers)
        assert kind == _RATING, f"{campaign} {found}: runs send ratings, and this is a {kind}"
        item = packed[_LOG.size : _LOG.size + length].decode()
        id_ = msgspec.msgpack.decode(packed[_LOG.size + length :])[0]
        sums = []
        for scope, position in ((f":{item}", of_item), ("", of_campaign)):
            if scope not in rings:
                rings[scope] = await _call(client, "GET", f"{start}ring{scope}")
            ring_seq, ring_sum = _RECORD.unpack_from(rings[scope], position * _RECORD.size)
            assert int.from_bytes(ring_seq, "big") == found, f"{campaign}{scope}: {position}"
            sums.append(ring_sum)
        running = Running(of_item, sums[0], of_campaign, sums[1])
        rows.append(Row(campaign, found, id_, item, rate, running))
    return rows


async def _totals(client: "redis.asyncio.Redis", campaign: str, start: str) -> _Totals:
    async def rates(scope: str) -> dict[int, int]:
        kept = await _call(client, "HGETALL", f"{start}rates{scope}")
        return {int(rate): int(count) for rate, count in kept.items()}

    whole = await _call(client, "HMGET", f"{start}campaign", "count", "sum")
    found: _Totals = {(campaign, None): (int(whole[0]), int(whole[1]), await rates(""))}
    items = await _call(client, "HGETALL", f"{start}items")
    for item, numbers in items.items():
        count, sum_, *_ = map(int, numbers.split())
        found[campaign, item.decode()] = (count, sum_, await rates(f":{item.decode()}"))
    return found


async def _call(client: "redis.asyncio.Redis", *command: Any) -> Any:
    """Send a command as it stands; some of the client's own methods are typed as sync."""
    execute: Callable[..., Awaitable[Any]] = client.execute_command
    return await execute(*command)
