"""What all parts of the NATS driver begin with: options, capabilities, the server."""

from dataclasses import dataclass, replace
from typing import Final, final

from molva._base.url import one_of, positive_integer, positive_number
from molva.messaging.driver import Capabilities
from molva.messaging.drivers._channel import channel_capabilities
from molva.messaging.drivers._nats_link import SERVER_OPTIONS, NATSAddress, NATSLink
from molva.messaging.errors import IncompatibleBrokerError
from molva.messaging.url import BrokerURL

__all__ = [
    "CHANNEL_CAPABILITIES",
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "SPARE_BYTES",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "NATSServer",
    "ServerOptions",
]

QUEUE_OPTIONS: Final = ("lease", "prefix", "replicas", "sync", *SERVER_OPTIONS)
TOPIC_OPTIONS: Final = ("start", *QUEUE_OPTIONS)

# What the header of the largest message may take, so that what is said of bodies holds for
# those with a key and some headers. A message with more is refused by its own size.
_ENVELOPE_BYTES: Final = 4_096
# Bytes below what a server takes that no message may fill: a dead letter says why beside it.
SPARE_BYTES: Final = 2_048

# The largest body that is taken, whatever a server is set up to take: 64 MB is the most that
# NATS allows.
_MAX_BODY_BYTES: Final = 67_108_864 - _ENVELOPE_BYTES - SPARE_BYTES

# Pull consumers have heartbeats, and streams can be asked by subject, since.
_OLDEST: Final = (2, 9)
# Servers before it cannot be set up to sync before they confirm.
_FIRST_THAT_SYNCS: Final = (2, 10)
# Servers before it sync each message of a batch by itself, which makes batches slower than none.
_FIRST_THAT_SYNCS_BATCHES: Final = (2, 15)
# Servers before it cannot tell a stream its first number. After it there are versions of which one
# that is killed empties such a stream: 2.10.0 to 2.10.27, 2.11.0 and 2.11.1. Found by killing them.
_FIRST_THAT_NUMBERS: Final = (2, 10)
_FIRST_THAT_NUMBER_WELL: Final = ((2, 10, 28), (2, 11, 2))
# Copies of a stream of which one may be lost while the others still are most of them.
_REPLICAS_TO_LOSE_ONE: Final = 3

# What a topic can do at best: three copies, each synced before it counts.
TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",  # "per-key" needs lanes that are owned; a consumer has none
    capacity="exact",
    survives=frozenset({"kill", "power", "node"}),
    max_body_bytes=_MAX_BODY_BYTES,
    holding="lease",
    attempts="exact",
    keeps_place=False,
    # Which messages above the first open one are settled, no server tells.
    peek=False,
)

# All that waits is counted; what of it is held and what waits for its delay, is not told.
QUEUE_CAPABILITIES: Final = replace(TOPIC_CAPABILITIES, stat="approximate")

# What a topic can do that is opened with ``delivery=at-most-once``.
CHANNEL_CAPABILITIES: Final = channel_capabilities(_MAX_BODY_BYTES)


@final
class ServerOptions:
    """The options of one URL."""

    def __init__(self, url: BrokerURL) -> None:
        url.check_driver_options(TOPIC_OPTIONS if url.queue is None else QUEUE_OPTIONS)
        self.lease = url.option("lease", positive_number, None)
        self.start = url.option("start", one_of("earliest", "latest"), "earliest")
        self.prefix = url.option("prefix", _prefix, "molva")
        self.replicas = url.option("replicas", _replicas, None)
        self.syncs = url.option("sync", one_of("always"), None) is not None


@final
@dataclass(frozen=True, slots=True)
class NATSServer:
    """A server that was reached and looked at.

    Attributes:
        link: The connection to it.
        version: Its version.
        max_payload: Bytes of a message, headers and all, that it takes at most.
        syncs: Whether it syncs before it confirms, as the URL says and its version can.
    """

    link: NATSLink
    version: tuple[int, int, int]
    max_payload: int
    syncs: bool

    @classmethod
    async def reach(cls, url: BrokerURL, options: ServerOptions) -> "NATSServer":
        """Reach the server that the URL names."""
        link = NATSLink(NATSAddress.of(url))
        try:
            connection = await link.connected()
            if connection.version < _OLDEST:
                raise IncompatibleBrokerError(
                    f"{link.address}: it is NATS {'.'.join(map(str, connection.version))}, and "
                    f"{'.'.join(map(str, _OLDEST))} or newer is needed"
                )
            syncs = options.syncs and connection.version >= _FIRST_THAT_SYNCS
            return cls(link, connection.version, connection.client.max_payload, syncs)
        except BaseException:
            await link.close()
            raise

    @property
    def syncs_batches(self) -> bool:
        """Whether it confirms messages that are stored as one behind one sync."""
        return self.syncs and self.version >= _FIRST_THAT_SYNCS_BATCHES

    @property
    def empties_numbered(self) -> bool:
        """Whether one that is killed empties a stream that was told its first number."""
        return self.version >= _FIRST_THAT_NUMBERS and not self.numbers_well

    @property
    def numbers_well(self) -> bool:
        """Whether it can tell a stream its first number, and keeps such a stream."""
        of_2_10, of_2_11 = _FIRST_THAT_NUMBER_WELL
        return self.version >= (of_2_10 if self.version < (2, 11) else of_2_11)

    def limited(
        self, capabilities: Capabilities, *, replicas: int, in_file: bool, numbered: bool = False
    ) -> Capabilities:
        """Return what of these capabilities there is with this server and stream.

        ``numbered``: the stream was told its first number.
        """
        survives: set[str] = set()
        if in_file:
            survives.add("kill")
            if self.syncs:
                survives.add("power")
        if replicas >= _REPLICAS_TO_LOSE_ONE:
            # Most copies have it before it is confirmed; killed one by one, none is missed.
            survives |= {"kill", "node"} if in_file else {"node"}
        if numbered and self.empties_numbered:
            survives.clear()
        most = self.max_payload - _ENVELOPE_BYTES - SPARE_BYTES
        return replace(
            capabilities,
            survives=capabilities.survives & survives,
            max_body_bytes=max(0, min(capabilities.max_body_bytes, most)),
        )


def _prefix(text: str) -> str:
    if not 1 <= len(text) <= 50 or not all(c.isascii() and (c.isalnum() or c == "-") for c in text):
        raise ValueError("1 to 50 letters, digits and hyphens are accepted")
    return text


def _replicas(text: str) -> int:
    number = positive_integer(text)
    if number > 5:
        raise ValueError("1 to 5 copies are accepted")
    return number
