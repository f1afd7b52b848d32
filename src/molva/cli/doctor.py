"""``molva doctor``: what is reachable, what the deployment survives, what is missing."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import click

from molva._base.redaction import redact
from molva.cli.exits import UNAVAILABLE
from molva.cli.options import deployment_options, json_option, spool_options

if TYPE_CHECKING:
    from molva.ratings.deployment import Deployment

__all__ = ["doctor"]


@dataclass(frozen=True, slots=True)
class _Finding:
    what: str
    ok: bool
    detail: str


@click.command()
@deployment_options
@spool_options
@click.option("--deep", is_flag=True, help="Read all of each SQLite file: a minute for 10 GB.")
@json_option
def doctor(deployment: "Deployment", data: Path, deep: bool, as_json: bool) -> None:
    """Say what is reachable, what the deployment survives, and what is missing.

    Exit code 3 where something is not well. Safe beside a running service; what is missing
    in --data is made, as any other command would.
    """
    findings = asyncio.run(_examine(deployment, data.absolute() / "spool", deep=deep))
    healthy = all(finding.ok for finding in findings)
    if as_json:
        document = {"ok": healthy, "findings": [asdict(finding) for finding in findings]}
        click.echo(json.dumps(document))
    else:
        for finding in findings:
            mark = click.style("ok ", fg="green") if finding.ok else click.style("NO ", fg="red")
            click.echo(f"{mark} {finding.what:<9} {finding.detail}")
    sys.exit(0 if healthy else UNAVAILABLE)


async def _examine(deployment: "Deployment", spools: Path, *, deep: bool) -> list[_Finding]:
    import apsw

    from molva.ratings.outbox import outboxes_survive
    from molva.ratings.spool_folder import SpoolFolder

    findings = [
        _Finding("sqlite", True, f"SQLite {apsw.sqlite_lib_version()}, apsw {apsw.apsw_version()}")
    ]
    kept: dict[str, frozenset[str]] = {}

    async def look(what: str, examine: Callable[[], Awaitable[str]]) -> None:
        try:
            findings.append(_Finding(what, True, await examine()))
        except Exception as error:  # noqa: BLE001 - whatever is wrong is a finding
            findings.append(_Finding(what, False, redact(str(error))))

    await look("broker", lambda: _broker(deployment, kept))
    await look("ledger", lambda: _ledger(deployment, kept))
    await look("catalog", lambda: _catalog(deployment))
    urls = [deployment.broker, deployment.ledger, deployment.catalog]
    if deployment.spool is not None:
        kept["spool"] = outboxes_survive()
    if deployment.spool is not None or spools.exists():
        found: list[tuple[str, bool]] = []

        async def look_into_spools() -> str:
            found.extend(SpoolFolder(spools).look())
            return await _spools(spools, found)

        await look("spool", look_into_spools)
        urls += [url for url, _ in found]
    if deep:
        for url in urls:
            path = _sqlite_path(url)
            if path is not None:
                await look("pages", partial(asyncio.to_thread, _read_all, path))
    away = [part for part in ("broker", "ledger") if part not in kept]
    common = frozenset.intersection(*kept.values()) if kept else frozenset()
    shown = ", ".join(fault for fault in ("kill", "power", "node") if fault in common) or "nothing"
    if away:
        others = f"; {' and '.join(kept)}: {shown}" if kept else ""
        shown = f"not known, because the {' and the '.join(away)} cannot be reached{others}"
    findings.append(_Finding("survives", bool(common) and not away, shown))
    return findings


def _sqlite_path(url: str) -> str | None:
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme == "sqlite" else None


def _read_all(path: str) -> str:
    """Read every page of a SQLite file, and compare every index with its table."""
    import apsw

    connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(1_000)
        found = [str(problem) for (problem,) in connection.execute("PRAGMA integrity_check")]
    finally:
        connection.close()
    if found != ["ok"]:
        raise ValueError(f"{path}: damaged, restore it from a copy ({'; '.join(found)[:500]})")
    return f"{path}: every page and index is sound"


async def _broker(deployment: "Deployment", kept: dict[str, frozenset[str]]) -> str:
    from molva.ratings.deployment import SUBSCRIPTION

    async with await deployment.open_topic() as topic:
        kept["broker"] = topic.capabilities.survives
        stat = await topic.stat()
        reading = stat and stat.subscriptions.get(SUBSCRIPTION)
        if stat is None:
            told = f"{redact(deployment.broker)}: reachable; it does not tell how much waits"
            return told if topic.capacity is not None else f"{told}, and nothing bounds it"
        if not reading:
            return f"{redact(deployment.broker)}: {stat.stored:,} stored, no worker has run yet"
        others = [
            f"; subscription {name!r} is {other.pending:,} behind and keeps them from being deleted"
            for name, other in stat.subscriptions.items()
            if name != SUBSCRIPTION and other.pending
        ]
        oldest = "" if reading.oldest_seconds is None else f" for {reading.oldest_seconds:.1f} s"
        return (
            f"{redact(deployment.broker)}: {stat.stored:,} stored, {reading.pending:,} waiting"
            f"{oldest}, {reading.dead:,} dead letters{''.join(others)}"
        )


async def _spools(folder: Path, found: list[tuple[str, bool]]) -> str:
    """Say what waits in the spools; raise where nobody will send it on."""
    from molva.ratings.outbox import look_into

    waiting = abandoned = dead = 0
    oldest = 0.0
    for url, is_held in found:
        stat = await look_into(url)
        waiting += stat.pending
        abandoned += 0 if is_held else stat.pending
        dead += stat.dead
        oldest = max(oldest, stat.oldest_seconds or 0.0)
    told = f"{folder}: {waiting:,} ratings wait for the broker"
    if waiting:
        told += f", the oldest for {oldest:.1f} s"
    problems = []
    if abandoned:
        problems.append(
            f"{abandoned:,} of them in spools of processes that are gone; molva serve "
            "--when-broker-down spool sends them on"
        )
    if dead:
        problems.append(f"{dead:,} were refused by the broker for good: molva queue dead")
    if problems:
        raise ValueError("; ".join([told, *problems]))
    return told


async def _ledger(deployment: "Deployment", kept: dict[str, frozenset[str]]) -> str:
    ledger = await deployment.open_ledger()
    try:
        kept["ledger"] = ledger.capabilities.survives
        last = await ledger.last_seq("default")
        horizon = ledger.capabilities.horizon_seconds
        if deployment.spool is not None:
            deployment.spool.check_horizon(horizon)
        known = "" if horizon is None else f", ids are known for {horizon / 3600:,.0f} h"
        return f"{redact(deployment.ledger)}: campaign 'default' stands at {last:,}{known}"
    finally:
        await ledger.close()


async def _catalog(deployment: "Deployment") -> str:
    catalog = await deployment.open_catalog()
    try:
        count = len(await catalog.campaigns())
        return f"{redact(deployment.catalog)}: {count} campaign{'' if count == 1 else 's'}"
    finally:
        await catalog.close()
