"""Comparing what the Redis ledger keeps twice. Pure."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from molva.ratings.ledger._schema import RATING
from molva.ratings.ledger.protocol import Difference

__all__ = ["differences"]

# As in _redis.lua.
_RECORD_BYTES: Final = 14
_LOG: Final = struct.Struct(">" + "6s" * 4 + "iBH")

_Numbers = Mapping[int, int]


def differences(
    campaign: str, scope: str, kept: Sequence[Any], window: int
) -> Iterator[Difference]:
    """Yield what contradicts itself in one scope.

    Args:
        campaign: Name of the campaign.
        scope: ``:`` and an item; nothing for the campaign as a whole.
        kept: What ``audit`` in _redis.lua returned.
        window: How many ratings are kept one by one.
    """
    of = f"item {scope[1:]!r}" if scope else "campaign"

    def differs(what: str, found: object, expected: object) -> Iterator[Difference]:
        if found != expected:
            yield Difference(campaign, f"{of}, {what}", found, expected)

    whole, items, ring, rates, shift, net, log = kept
    numbers = {name.decode(): int(value) for name, value in _pairs(whole)}
    seq = numbers.get("seq", 0)
    if scope:
        count, sum_, d_count, d_sum = (int(number) for number in items[0].split())
    else:
        count, sum_, d_count, d_sum = (
            numbers.get(name, 0) for name in ("count", "sum", "d_count", "d_sum")
        )
        of_items = [[int(number) for number in item.split()] for item in items]
        totals = [sum(column) for column in zip(*of_items, strict=True)] or [0, 0, 0, 0]
        yield from differs(
            "items: count, sum and corrections", totals, [count, sum_, d_count, d_sum]
        )
        yield from _log_differences(campaign, log, ring, count, seq, window)
    raw, shifted = _tally(rates), _tally(shift)
    yield from differs("rates: count", sum(raw.values()), count)
    yield from differs("rates: sum", sum(rate * n for rate, n in raw.items()), sum_)
    yield from differs("shift: count", sum(shifted.values()), d_count)
    yield from differs("shift: sum", sum(rate * n for rate, n in shifted.items()), d_sum)
    if count <= window:
        nets = [[int(number) for number in value.split()] for _, value in _pairs(net)]
        found = [sum(column) for column in zip(*nets, strict=True)] or [0, 0]
        yield from differs("net: count and sum", found, [d_count, d_sum])
    if not count:
        return
    records = _records(ring, count, window)
    seqs = [record_seq for record_seq, _ in records]
    yield from differs("ring: order of seq", seqs, sorted(set(seqs)))
    yield from differs("ring: last sum", records[-1][1], sum_)
    yield from differs("ring: last seq within the campaign", seqs[-1] <= seq, True)
    before = 0 if count <= window else None
    seen: dict[int, int] = {}
    for _, running in records:
        if before is not None:
            seen[running - before] = seen.get(running - before, 0) + 1
        before = running
    if count <= window:
        yield from differs("ring: rates", seen, raw)
    else:
        excess = {rate: n for rate, n in seen.items() if n > raw.get(rate, 0)}
        yield from differs("ring: more of a rate than were counted", excess, {})


def _log_differences(
    campaign: str, log: Sequence[bytes], ring: bytes, count: int, seq: int, window: int
) -> Iterator[Difference]:
    if len(log) != min(seq, window):
        yield Difference(campaign, "log: entries", len(log), min(seq, window))
        return
    records = dict(
        zip(range(max(1, count - window), count + 1), _records(ring, count, window), strict=True)
        if count
        else ()
    )
    for expected, packed in zip(range(seq - len(log) + 1, seq + 1), log, strict=True):
        *numbers, _, kind, _ = _LOG.unpack_from(packed)
        found, position = (int.from_bytes(n, "big") for n in numbers[:2])
        if found != expected:
            yield Difference(campaign, f"entry {expected}: seq", found, expected)
        if kind == RATING and position in records and records[position][0] != found:
            yield Difference(
                campaign, f"entry {expected}: seq in the ring", records[position][0], found
            )


def _records(ring: bytes, count: int, window: int) -> list[tuple[int, int]]:
    """Return (seq, running sum) of the last ratings, oldest first; one more than counts."""
    slots = window + 1
    found = []
    for position in range(max(1, count - window), count + 1):
        at = position % slots * _RECORD_BYTES
        packed = ring[at : at + _RECORD_BYTES].ljust(_RECORD_BYTES, b"\0")
        found.append((int.from_bytes(packed[:6], "big"), struct.unpack(">q", packed[6:])[0]))
    return found


def _tally(flat: Sequence[bytes]) -> dict[int, int]:
    return {int(rate): int(number) for rate, number in _pairs(flat)}


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return cast("list[tuple[bytes, bytes]]", list(zip(flat[::2], flat[1::2], strict=True)))
