"""Connections to an AMQP server, opened when they are needed and again after they were lost.

The client library can reconnect by itself; that was rejected. It would take up what it had
declared without telling, and an acknowledgement that belongs to the connection before would go
out on the one after it, where its number is another message's.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Iterator
from typing import Final, final

import aiormq
from aiormq.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelInvalidStateError,
    ChannelPreconditionFailed,
    ConnectionClosed,
    ConnectionNotAllowed,
    IncompatibleProtocolError,
    InvalidFrameError,
    ProbableAuthenticationError,
    ProtocolSyntaxError,
)

from molva._base.waiting import is_being_cancelled
from molva.messaging.drivers._amqp_options import AMQPAddress
from molva.messaging.errors import (
    IncompatibleBrokerError,
    InvalidURLError,
    MessagingError,
    UnavailableError,
)

__all__ = ["ANSWER", "AMQPLink", "translated"]

# Seconds for connecting, and for an answer to what is not a message. Longer, and a server that
# hangs holds up its callers; shorter, and a busy one is taken for dead.
ANSWER: Final = 4.0
# Seconds that saying goodbye may take.
_GOODBYE: Final = 1.0

_NOT_ALLOWED: Final = 530
# Quorum queues deliver more than once without losing: dead-lettering at least once.
_OLDEST: Final = (3, 10)


# Seconds between two lines of one kind about a connection.
_LINES: Final = 5.0


@final
class _Seldom(logging.Filter):
    """Lets pass one line of a kind in five seconds: there is one for every try to connect."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.created < self._next.get(str(record.msg), 0.0):
            return False
        self._next[str(record.msg)] = record.created + _LINES
        return True


logging.getLogger("aiormq.connection").addFilter(_Seldom())


@final
class AMQPLink:
    """One connection.

    Args:
        address: Where the server is.
        role: What the connection is for, as the server's tools show it.
    """

    def __init__(self, address: AMQPAddress, role: str) -> None:
        self._address = address
        self._role = role
        self._connection: aiormq.Connection | None = None
        self._turn = asyncio.Lock()
        self._closed = False
        self._was_in = False
        # Held by whoever looks into a queue over this connection.
        self.looking: Final = asyncio.Lock()

    @property
    def address(self) -> AMQPAddress:
        """Where the server is."""
        return self._address

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Return a new channel.

        Raises:
            UnavailableError: The server cannot be reached now.
            InvalidURLError: It does not let us in.
        """
        with translated(self._address):
            async with self._turn:
                try:
                    async with asyncio.timeout(ANSWER):
                        return await self._new_channel(confirms=confirms)
                except TimeoutError:
                    # It may have died without a word, which heartbeats tell a minute later. One
                    # that is full does not answer either, and is there.
                    if not self.is_blocked():
                        await self.drop()
                    raise

    async def _new_channel(self, *, confirms: bool) -> Channel:
        connection = await self._connect()
        try:
            channel = await connection.channel(publisher_confirms=confirms)
        except RuntimeError as error:  # it was closed in this very moment
            raise ConnectionError(str(error)) from error
        assert isinstance(channel, Channel)
        return channel

    async def _connect(self) -> aiormq.Connection:
        if self._closed:
            raise ConnectionError("closed")
        if self._connection is None or not self._connection.is_opened:
            connection = aiormq.Connection(
                self._address.url(f"molva {self._role}"), context=self._address.context()
            )
            try:
                await connection.connect()
            except InvalidFrameError as error:
                # The client library does not say what the server said instead of "open".
                if "OpenOk" not in str(error) or self._was_in:
                    raise
                raise InvalidURLError(
                    f"{self._address}: there is no vhost {self._address.vhost!r}, or user "
                    f"{self._address.user!r} has no rights there"
                ) from error
            self._connection = connection
            try:
                _check_version(self._address, connection)
            except IncompatibleBrokerError:
                await self.drop()
                raise
            self._was_in = True
        return self._connection

    def is_blocked(self) -> bool:
        """Whether the server takes no messages for now: its memory or disk is full."""
        if self._connection is None:
            return False
        # The one way in which the client library tells: this waits for as long as it is so.
        ready = self._connection.ready()
        try:
            ready.send(None)
        except StopIteration:
            return False
        finally:
            ready.close()
        return True

    async def drop(self, only: AbstractConnection | None = None) -> None:
        """Close a connection that is of no use any more; the next channel opens another.

        Args:
            only: That one, and not another that was opened since.
        """
        connection = only or self._connection
        if connection is self._connection:
            self._connection = None
        if connection is not None:
            with contextlib.suppress(MessagingError), translated(self._address):
                async with asyncio.timeout(_GOODBYE):
                    await connection.close()

    async def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        await self.drop()


def _check_version(address: AMQPAddress, connection: aiormq.Connection) -> None:
    properties = connection.server_properties
    product, version = str(properties.get("product")), str(properties.get("version"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if product != "RabbitMQ" or numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise IncompatibleBrokerError(
            f"{address} is {product} {version}; RabbitMQ {oldest} or newer is needed"
        )


@contextlib.contextmanager
def translated(address: AMQPAddress) -> Iterator[None]:
    """Raise what went wrong as messaging's errors."""
    try:
        yield
    except (AuthenticationError, ProbableAuthenticationError) as error:
        raise InvalidURLError(
            f"{address}: name and password are refused; write amqp://user:password@host, or set "
            "MOLVA_AMQP_USERNAME and MOLVA_AMQP_PASSWORD"
        ) from error
    except (ConnectionNotAllowed, ChannelAccessRefused) as error:
        raise InvalidURLError(
            f"{address}: {_text(error)}; user {address.user!r} needs the rights to configure, "
            "write and read what begins with the prefix, and to write to the default exchange: "
            "see rabbitmqctl set_permissions"
        ) from error
    except ConnectionClosed as error:
        if error.args and error.args[0] == _NOT_ALLOWED:
            raise InvalidURLError(
                f"{address}: {_text(error)}; the path of the URL names the vhost "
                f"({address.vhost!r}): see rabbitmqctl list_vhosts, set_permissions"
            ) from error
        raise UnavailableError(f"{address}: {_text(error)}") from error
    except InvalidFrameError as error:
        raise UnavailableError(f"{address}: {error}") from error
    except (IncompatibleProtocolError, ProtocolSyntaxError) as error:
        raise IncompatibleBrokerError(f"{address} does not speak AMQP 0-9-1: {error}") from error
    except AMQPConnectionError as error:
        cause = error.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise InvalidURLError(
                f"{address}: its certificate is refused: {cause.verify_message}; ca= names the "
                "file of the authorities to trust, and it must be made out to the URL's host"
            ) from error
        raise UnavailableError(f"{address} cannot be reached: {_text(error)}") from error
    except ChannelPreconditionFailed as error:
        remedy = ""
        if "inequivalent" in str(error):
            remedy = (
                "; what is there was made otherwise, which cannot change: use another name or "
                "prefix=, or delete it (rabbitmqctl delete_queue)"
            )
        raise IncompatibleBrokerError(f"{address}: {_text(error)}{remedy}") from error
    except asyncio.CancelledError as error:
        if is_being_cancelled():
            raise
        raise UnavailableError(f"{address}: the connection was closed") from error
    except TimeoutError as error:
        raise UnavailableError(f"{address}: no answer in time") from error
    except (AMQPError, OSError, ChannelInvalidStateError) as error:
        raise UnavailableError(f"{address}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    return " ".join(str(part) for part in error.args) or repr(error)
