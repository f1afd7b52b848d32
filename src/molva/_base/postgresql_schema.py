"""A schema of ours in a PostgreSQL database: made, migrated and checked by its version.

A schema says what it is in a table of one row, ``molva``: its kind and its version.
Migrations run by command only (``molva migrate``), never because a process happened to be
started: while an update of many machines is under way, the first new one would take the
ledger from all the old ones.
"""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Final

import asyncpg

from molva._base.postgresql import PostgreSQL, RefusedError, VersionError

__all__ = ["check_or_make_schema", "in_schema", "migrate_schema", "read_script"]

# Seconds that making or migrating may take; building an index over 10⁸ rows is minutes.
_MIGRATION_TIMEOUT: Final = 3_600.0


def read_script(package: str, name: str) -> str:
    """Return a script that is shipped in a package."""
    return (files(package) / name).read_text()


def in_schema(sql: str, schema: str) -> str:
    """Return SQL whose ``molva.`` stands for the schema of that name.

    >>> in_schema("SELECT * FROM molva.entry", "ours")
    'SELECT * FROM "ours".entry'
    """
    quoted = _quoted(schema)
    return re.sub(r"\bmolva\.", lambda _: f"{quoted}.", sql)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


async def check_or_make_schema(server: PostgreSQL, kind: str, scripts: Sequence[str]) -> None:
    """Make the schema where it is missing and may be made; check its version.

    Args:
        server: Its URL names the schema.
        kind: ``ledger`` or ``catalog``.
        scripts: One for each version, from the first on.

    Raises:
        VersionError: It is of another version, or something else, or missing.
        PostgreSQLError: The server failed.
    """
    version = await server.run(lambda connection: _version(connection, server, kind))
    if version is None:
        if not server.url.create:
            raise VersionError(
                f"{server.url.shown}: holds no {kind} in schema {server.url.schema!r}; 'molva "
                "migrate' or create=auto makes one"
            )
        await migrate_schema(server, kind, scripts)
    elif version > len(scripts):
        raise _newer(server, kind, version, len(scripts))
    elif version < len(scripts):
        raise VersionError(
            f"{server.url.shown}: the {kind} is of version {version}, this molva works with "
            f"{len(scripts)}; stop the older processes and run 'molva migrate'"
        )


async def migrate_schema(server: PostgreSQL, kind: str, scripts: Sequence[str]) -> tuple[int, int]:
    """Make the schema, or bring it to the newest version; return the old and the new one.

    In one transaction: it is there as a whole or not at all. Version 0 is a schema that
    was missing.

    Raises:
        VersionError: It is newer, or something else.
        PostgreSQLError: The server failed.
    """
    schema = server.url.schema

    async def migrate(connection: asyncpg.Connection) -> tuple[int, int]:
        async with server.transaction(connection):
            # Several processes may start at once, and one makes the schema.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"molva {schema}"
            )
            version = await _version(connection, server, kind) or 0
            if version > len(scripts):
                raise _newer(server, kind, version, len(scripts))
            if version == 0:
                await connection.execute(
                    in_schema(
                        f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)};"
                        "CREATE TABLE molva.molva (kind text NOT NULL, version integer NOT NULL);"
                        f"INSERT INTO molva.molva VALUES ('{kind}', 0)",
                        schema,
                    )
                )
            for script in scripts[version:]:
                await connection.execute(in_schema(script, schema))
            await connection.execute(
                in_schema("UPDATE molva.molva SET version = $1", schema), len(scripts)
            )
            return version, len(scripts)

    try:
        return await server.run(migrate, timeout=_MIGRATION_TIMEOUT)
    except RefusedError as error:
        raise RefusedError(
            f"{error}; let a role that may do so run 'molva migrate', and grant this one the rest"
        ) from error


def _newer(server: PostgreSQL, kind: str, version: int, known: int) -> VersionError:
    return VersionError(
        f"{server.url.shown}: the {kind} is of version {version}, newer than {known}, the newest "
        "that this molva knows; upgrade molva"
    )


async def _version(connection: asyncpg.Connection, server: PostgreSQL, kind: str) -> int | None:
    """Return the schema's version; None where there is none, or an empty one."""
    schema, shown = server.url.schema, server.url.shown
    # The catalog's tables themselves: to_regclass may answer from a cache that is older
    # than the lock for which we waited.
    found = await connection.fetchrow(
        "SELECT count(*) FILTER (WHERE relname = 'molva'), count(*) FROM pg_class "
        "JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE nspname = $1",
        schema,
    )
    assert found is not None
    if not found[0]:
        if found[1]:
            raise VersionError(
                f"{shown}: schema {schema!r} holds something else; name another with schema="
            )
        return None
    row = await connection.fetchrow(in_schema("SELECT kind, version FROM molva.molva", schema))
    if row is None or row["kind"] != kind:
        what = "something else" if row is None else f"a {row['kind']}"
        raise VersionError(f"{shown}: schema {schema!r} holds {what}, no {kind}")
    version = row["version"]
    assert isinstance(version, int)
    return version
