"""What only some versions of the NATS server can: elsewhere its tests are skipped, and say so."""

from molva.messaging.drivers._nats_link import NATSAddress, NATSLink
from molva.messaging.drivers._nats_opening import NATSServer
from molva.messaging.url import BrokerURL
from tests.brokers.nats import program_version
from tests.brokers.server import ensure_local, wait_ready
from tests.brokers.table import KINDS
from tests.conftest import skip_without

__all__ = ["need_batches", "need_numbers", "need_present", "server_of"]


def server_of(version: tuple[int, ...], *, syncs: bool) -> NATSServer:
    """Return a server of a version, as the driver sees it; nobody is asked."""
    major, minor, patch = version
    link = NATSLink(NATSAddress.of(BrokerURL.parse("nats://h")))
    return NATSServer(link, (major, minor, patch), 1_048_576, syncs)


def need_batches(url: str) -> None:
    """Skip unless what is stored as one is synced as one."""
    version = _version(url)
    if not server_of(version, syncs=True).syncs_batches:
        skip_without("nats", f"{version} syncs each message of a batch by itself")


def need_numbers(url: str) -> None:
    """Skip unless a stream can be told its first number."""
    version = _version(url)
    if not server_of(version, syncs=True).numbers_well:
        skip_without("nats", f"{version} cannot be told a first number, or loses such streams")


def need_present(*, since: tuple[int, int], what: str) -> None:
    """Skip where the servers that tests run are older than ``since``, which can ``what``."""
    ensure_local(KINDS["nats"])
    if program_version() < since:
        skip_without("nats", f"{'.'.join(map(str, program_version()))} cannot {what}")


def _version(url: str) -> tuple[int, ...]:
    version = wait_ready(KINDS["nats"], url)
    assert version is not None
    return tuple(map(int, version.split(".")))
