"""Exit codes, and which error ends a command with which."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Final, NoReturn

import click

from molva.messaging import (
    BrokenBrokerError,
    IncompatibleBrokerError,
    InUseError,
    InvalidURLError,
    MessagingError,
    MissingExtraError,
    NotFoundError,
    UnsupportedFeatureError,
)

__all__ = [
    "BROKEN",
    "DIFFERENCE",
    "INCOMPATIBLE",
    "IN_USE",
    "UNAVAILABLE",
    "UNMET_PROMISE",
    "USAGE",
    "fail",
    "translated_errors",
]

# Adding one here? Also docs/cli.md, which a test compares.
DIFFERENCE: Final = 1  # verify found a difference; an import left rows out
USAGE: Final = 2  # an option, a URL or a file's content was refused, or the broker cannot do it
UNAVAILABLE: Final = 3  # a broker, ledger, catalog or service cannot be reached now
IN_USE: Final = 4  # another molva uses the folder or a subscription, another program the address
INCOMPATIBLE: Final = 5  # a file or schema is of another version, damaged, or something else
UNMET_PROMISE: Final = 6  # the deployment does not survive what --survive asked for
BROKEN: Final = 74  # an I/O error: start the process again (sysexits.h calls it EX_IOERR)


def fail(code: int, text: str) -> NoReturn:
    """Say what went wrong on stderr, and end with ``code``."""
    click.echo(f"molva: {text}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """End the command with the right code for whatever the block raises."""
    try:
        yield
    except (InvalidURLError, MissingExtraError) as error:
        fail(USAGE, str(error))
    except IncompatibleBrokerError as error:
        fail(INCOMPATIBLE, str(error))
    except BrokenBrokerError as error:
        fail(BROKEN, str(error))
    except (NotFoundError, UnsupportedFeatureError) as error:
        fail(USAGE, str(error))
    except InUseError as error:
        fail(IN_USE, str(error))
    except MessagingError as error:
        fail(UNAVAILABLE, str(error))
    except Exception as error:
        _fail_of_ratings(error)
        raise


def _fail_of_ratings(error: Exception) -> None:
    """End for an error of the rating service; return where it is none of its own.

    Imported only now: a base installation has messaging alone.
    """
    with contextlib.suppress(ImportError):
        from molva.ratings import catalog, deployment, ledger, server, spool

        table: tuple[tuple[type[Exception] | tuple[type[Exception], ...], int], ...] = (
            ((ledger.LedgerVersionError, catalog.CatalogVersionError), INCOMPATIBLE),
            (catalog.CatalogDamagedError, INCOMPATIBLE),
            (ledger.LedgerServerError, INCOMPATIBLE),
            (ledger.LedgerUnsupportedError, USAGE),
            ((ledger.LedgerURLError, catalog.CatalogURLError), USAGE),
            (catalog.ScaleNarrowedError, USAGE),
            ((ledger.LedgerBrokenError, catalog.CatalogBrokenError), BROKEN),
            ((ledger.LedgerError, catalog.CatalogError), UNAVAILABLE),
            (deployment.UnmetPromiseError, UNMET_PROMISE),
            (deployment.UnsharedBrokerError, USAGE),
            (spool.ForgetfulLedgerError, USAGE),
            (server.AddressInUseError, IN_USE),
            (server.BrokenStorageError, BROKEN),
        )
        for kinds, code in table:
            if isinstance(error, kinds):
                fail(code, str(error))
