"""A connection to NATS that loses no answer: where the server is, asking it, being cut off.

The client library's own reconnecting is switched off. It would keep what was not sent yet and
send it over the next connection, also an acknowledgement whose time is over, and it would
leave whoever waits for an answer waiting for all of their patience. Here a connection that
ends, ends whatever was asked over it, at once; the next call opens another.

Answers come to one inbox. Many questions may be under way at a time, and one future tells when
all of a batch are answered: a future for each would cost as much as the rest.
"""

import asyncio
import contextlib
import itertools
import os
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NATSClientError

from molva._base.url import ResourceURL, host_and_port
from molva.messaging.drivers._waiting import in_background
from molva.messaging.errors import InvalidURLError, MessagingError, UnavailableError

__all__ = [
    "SERVER_OPTIONS",
    "Connection",
    "Host",
    "Hosts",
    "NATSAddress",
    "NATSLink",
    "Question",
    "nobody_answered",
    "status_of",
]

# What every URL of a NATS server may say about the connection.
SERVER_OPTIONS: Final = ("ca",)

# Seconds for connecting, and for an answer. Longer, and a server that hangs holds up its
# callers; shorter, and one whose disk is slow is taken for dead.
_TIMEOUT: Final = 4.0

# Seconds for an orderly end of a connection.
_GOODBYE: Final = 0.2

# Questions, and bytes, that are under way at most. Fewer, and the connection idles between
# two looks; more, and a server that is behind refuses what it cannot queue (10,000).
_MOST_UNDER_WAY: Final = 1_000
_MOST_BYTES_UNDER_WAY: Final = 8_000_000

_DEFAULT_PORT: Final = 4222
_USERNAME: Final = "MOLVA_NATS_USERNAME"
_PASSWORD: Final = "MOLVA_NATS_PASSWORD"
_TOKEN: Final = "MOLVA_NATS_TOKEN"

_NO_RESPONDERS: Final = "503"


class Question(NamedTuple):
    """What is published and answered. Without a subject it comes to us, and answers itself."""

    subject: str
    payload: bytes = b""
    headers: Mapping[str, str] | None = None


Host = tuple[str, int]


@final
class Hosts:
    """The servers of a cluster in the order in which one connection tries them.

    Whoever failed last is tried last: a server that hangs takes a connection, and all of the time
    there is for it, again and again.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        # Not all clients of a cluster begin with its first.
        self._hosts = random.sample(hosts, len(hosts))

    def in_turn(self) -> tuple[Host, ...]:
        """Return them, the most promising one first."""
        return tuple(self._hosts)

    def put_last(self, host: Host) -> None:
        """Note that one has failed."""
        self._hosts.remove(host)
        self._hosts.append(host)


@final
@dataclass(frozen=True, slots=True, repr=False)
class NATSAddress:
    """Where servers of one cluster are and how to log in there. Its repr shows no password."""

    hosts: tuple[Host, ...]
    username: str | None
    password: str | None
    token: str | None
    tls: bool
    ca: str | None

    @classmethod
    def of(cls, url: ResourceURL) -> "NATSAddress":
        """Return what a URL says, and the environment where it has no password."""
        if url.path.strip("/"):
            raise url.error(f"{url.scheme}: a path says nothing to NATS; write nats://host:4222")
        ca = url.authorities(secure="tls")
        username, password, token = url.user, url.password, None
        if password is None:
            if username is not None and not os.environ.get(_PASSWORD):
                # NATS itself reads a name alone as a token, which would then be shown as one.
                raise url.error(
                    f"{url.scheme}: a name without a password is refused; put both into the URL "
                    f"or the password into {_PASSWORD}, and a token into {_TOKEN}"
                )
            username = username or os.environ.get(_USERNAME) or None
            password = os.environ.get(_PASSWORD) or None
            token = None if username else os.environ.get(_TOKEN) or None
        return cls(_hosts(url), username, password, token, url.scheme == "tls", ca)

    def __str__(self) -> str:
        shown = (
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        return f"{'tls' if self.tls else 'nats'}://{','.join(shown)}"

    def __repr__(self) -> str:
        return f"<NATSAddress {self}>"

    async def connect(
        self,
        hosts: Hosts,
        on_end: Callable[[], Awaitable[None]],
        on_error: Callable[[Exception], Awaitable[None]],
    ) -> tuple[Client, Host]:
        """Open a connection to one of the servers; return it, and which one it is.

        ``on_end`` is run when it ends, ``on_error`` for what the server complains of.

        Raises:
            UnavailableError: None of them can be reached now.
            InvalidURLError: The name, the password or the certificate is not right.
        """
        problem: BaseException | None = None
        for host in hosts.in_turn():
            try:
                async with asyncio.timeout(_TIMEOUT):
                    return await self._connect_to(*host, on_end, on_error), host
            except (NATSClientError, OSError, TimeoutError, ValueError) as error:
                problem = error
                hosts.put_last(host)
                if _says_who_we_are_is_wrong(error):
                    break
        assert problem is not None
        raise self._explained(problem) from problem

    async def _connect_to(
        self,
        host: str,
        port: int,
        on_end: Callable[[], Awaitable[None]],
        on_error: Callable[[Exception], Awaitable[None]],
    ) -> Client:
        errors: deque[Exception] = deque(maxlen=1)
        is_open = False

        async def note(error: Exception) -> None:
            errors.append(error)
            if not is_open and len(self.hosts) > 1:
                # The library would try the same one again, every two seconds.
                raise error
            await on_error(error)

        async def note_end() -> None:
            # It also says so of what never began: whose end that is, is another's beginning.
            if is_open:
                await on_end()

        trust = _Trust.of(self.ca) if self.tls else None

        def secret(text: str | None) -> Callable[[], str] | None:
            if text is None:
                return None
            # Asked for when it is about to be sent: never in the clear where TLS was wanted.
            return lambda: text if trust is None else trust.only_if_used(text)

        client = Client()
        shown = f"[{host}]" if ":" in host else host
        try:
            await client.connect(
                f"{'tls' if self.tls else 'nats'}://{shown}:{port}",
                name="molva",
                user=self.username,
                password=secret(self.password),
                token=secret(self.token),
                tls=trust,
                tls_hostname=host if self.tls else None,
                allow_reconnect=False,
                connect_timeout=round(_TIMEOUT),
                # Unbounded: the library would wait for its turn to write, and for ever where the
                # connection ends before. How much is under way is bounded in ``ask``.
                pending_size=0,
                error_cb=note,
                closed_cb=note_end,
                # Every subject is one of ours, encoded, or one that the server gave.
                skip_subject_validation=True,
            )
            if trust is not None:
                trust.only_if_used("")
            is_open = True
        except BaseException as error:
            with contextlib.suppress(Exception):
                await client.close()
            if isinstance(error, Exception) and errors and not str(error):
                raise errors[-1] from error
            raise
        return client

    def _explained(self, error: BaseException) -> MessagingError:
        certificate = _certificate_error(error)
        if certificate is not None:
            return InvalidURLError(
                f"{self}: its certificate is refused: {certificate.verify_message}; connect by a "
                "name that it is made out to, and name its authority with ca="
            )
        text = str(error).removeprefix("nats: ").strip("'\" ")
        if _says_who_we_are_is_wrong(error):
            return InvalidURLError(
                f"{self}: {text}; put name and password into the URL, or into {_USERNAME} and "
                f"{_PASSWORD}, or a token into {_TOKEN}"
            )
        if isinstance(error, ssl.SSLError) or "TLS" in text or "tls" in text:
            hint = "write nats:// for one without TLS" if self.tls else "write tls:// for one with"
            return UnavailableError(f"{self}: {text}; {hint}")
        if isinstance(error, TimeoutError) or not text:
            return UnavailableError(f"{self}: no answer in time")
        return UnavailableError(f"{self}: {text}")


class _Trust(ssl.SSLContext):
    """Whom we trust, and whether anybody was asked to show who it is.

    The client library speaks TLS only with a server that asks for it, and goes on in the clear
    with any other: whoever stands between could say that it is such a one.
    """

    used = False

    @classmethod
    def of(cls, ca: str | None) -> "_Trust":
        """Return one that trusts the system's authorities, or those of a file."""
        trust = cls(ssl.PROTOCOL_TLS_CLIENT)
        if ca is None:
            trust.load_default_certs()
        else:
            trust.load_verify_locations(ca)
        return trust

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """Begin TLS, as a connection does."""
        self.used = True
        return super().wrap_bio(*arguments, **named)

    def only_if_used(self, text: str) -> str:
        """Return the text. Raises ConnectionError where the connection is in the clear."""
        if not self.used:
            raise ConnectionError("the server does not speak TLS")
        return text


def _hosts(url: ResourceURL) -> tuple[Host, ...]:
    found = []
    for text in url.host.split(","):
        at = host_and_port(text, _DEFAULT_PORT)
        if at is None:
            raise url.error(
                f"{url}: {text!r} is no host; write nats://host:4222, or several with commas "
                "between them (a port is 1 to 65535)"
            )
        found.append(at)
    return tuple(found)


def _says_who_we_are_is_wrong(error: BaseException) -> bool:
    text = str(error).lower()
    if "authentication timeout" in text:
        return False  # we, or the server, stood still for some seconds
    return "authorization violation" in text or "authentication" in text


def _certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


@final
class _Batch:
    """Questions that were asked together."""

    __slots__ = ("answers", "left", "moved")

    def __init__(self, number: int) -> None:
        self.answers: list[Msg | None] = [None] * number
        self.left = number
        # Set whenever something was answered, or nothing ever will be.
        self.moved = asyncio.Event()


@final
class Connection:
    """One connection, and what was asked over it. It ends once, and then for good."""

    def __init__(self, address: NATSAddress) -> None:
        self._address = address
        self._host: Host | None = None
        self._client: Client | None = None
        self._inbox = ""
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[_Batch, int]] = {}
        self._batches: set[_Batch] = set()
        # What the server has refused us: a question about it is never answered.
        self._denied: str | None = None
        self.ended: Final = asyncio.Event()
        # Set when it ends: the events of whoever waits for something else meanwhile.
        self.wakes: Final[set[asyncio.Event]] = set()

    async def open(self, hosts: Hosts) -> None:
        """Connect to one of ``hosts``."""
        client, self._host = await self._address.connect(hosts, self._note_end, self._note_error)
        self._client = client
        self._inbox = client.new_inbox() + "."
        try:
            await self.subscribe(self._inbox + "*", self._note_answer)
        except BaseException:
            await self.close()
            raise

    @property
    def client(self) -> Client:
        """The library's own."""
        assert self._client is not None
        return self._client

    @property
    def host(self) -> Host:
        """The server that it is to."""
        assert self._host is not None
        return self._host

    @property
    def version(self) -> tuple[int, int, int]:
        """The server's version."""
        found = self.client.connected_server_version
        return found.major, found.minor, found.patch

    def new_inbox(self) -> str:
        """Return a subject that is nobody else's."""
        return self.client.new_inbox()

    async def subscribe(
        self, subject: str, note: Callable[[Msg], Awaitable[None]], *, group: str = ""
    ) -> Subscription:
        """Have ``note`` run for each message of a subject. It must not wait for this one."""
        try:
            # Unbounded: the library would drop what is more, and what comes was asked for.
            return await self.client.subscribe(
                subject, queue=group, cb=note, pending_msgs_limit=0, pending_bytes_limit=0
            )
        except (NATSClientError, OSError) as error:
            raise self._gone() from error

    async def publish(
        self,
        subject: str,
        payload: bytes = b"",
        reply: str = "",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Publish without an answer."""
        try:
            await self.client.publish(subject, payload, reply, headers)
        except (NATSClientError, OSError) as error:
            raise self._gone() from error

    async def flush(self) -> None:
        """Return when the server has done, or has refused, all that was sent.

        By a message to ourselves. The library's own ``flush`` writes its ping ahead of what
        still waits to be written, and is answered before the server has seen that.

        Raises:
            UnavailableError: The connection ended before, or nothing came for too long.
            InvalidURLError: The server has refused some of it.
        """
        await self.ask([Question("")])

    async def ask(self, questions: Sequence[Question]) -> list[Msg]:
        """Publish all of them, in their order; return their answers, in that order.

        Raises:
            UnavailableError: The connection ended before all were answered, or nothing was
                answered for too long, which ends it.
        """
        batch = _Batch(len(questions))
        first = last = -1
        sent = sent_bytes = 0
        self._batches.add(batch)
        publish, asked, inbox = self.client.publish, self._asked, self._inbox
        try:
            for place, (subject, payload, headers) in enumerate(questions):
                last = next(self._numbers)
                first = last if first < 0 else first
                asked[last] = (batch, place)
                reply = f"{inbox}{last}"
                await publish(subject or reply, payload, reply, headers)  # type: ignore[arg-type]
                sent += 1
                sent_bytes += len(payload)
                while (
                    sent - (len(questions) - batch.left) >= _MOST_UNDER_WAY
                    or sent_bytes >= _MOST_BYTES_UNDER_WAY
                ):
                    if await self._progress(batch, sent):
                        sent_bytes = 0
            while batch.left:
                await self._progress(batch, len(questions))
        except (NATSClientError, OSError) as error:
            raise self._gone() from error
        finally:
            self._batches.discard(batch)
            if batch.left:
                for number in range(first, last + 1):
                    # Others have asked in between, and still wait.
                    if number in asked and asked[number][0] is batch:
                        del asked[number]
        return batch.answers  # type: ignore[return-value]

    async def ask_as_one(self, questions: Sequence[Question]) -> Msg:
        """Publish all of them, in their order; return the answer to the last, which is for all.

        Raises:
            UnavailableError, InvalidURLError: As ``ask``.
        """
        *others, last = questions
        for subject, payload, headers in others:
            await self.publish(subject, payload, headers=headers)  # type: ignore[arg-type]
        [answer] = await self.ask([last])
        return answer

    async def _progress(self, batch: _Batch, sent: int) -> bool:
        """Wait until more is answered; return whether all that was sent is."""
        if len(batch.answers) - batch.left >= sent:
            return True
        batch.moved.clear()
        self._check_rights()
        if self.ended.is_set():
            raise self._gone()
        try:
            async with asyncio.timeout(_TIMEOUT):
                await batch.moved.wait()
        except TimeoutError:
            # What it answers later would be taken for nobody's; whoever waits asks anew.
            await self.close()
            raise UnavailableError(f"{self._address}: no answer in time") from None
        self._check_rights()
        return len(batch.answers) - batch.left >= sent

    async def _note_answer(self, msg: Msg) -> None:
        found = self._asked.pop(int(msg.subject[len(self._inbox) :]), None)
        if found is None:
            return
        batch, place = found
        batch.answers[place] = msg
        batch.left -= 1
        batch.moved.set()

    def _check_rights(self) -> None:
        if self._denied is not None:
            denied, self._denied = self._denied, None
            raise InvalidURLError(f"{self._address}: {denied}; give this user the right to do so")

    async def _note_error(self, error: Exception) -> None:
        text = str(error).removeprefix("nats: ").strip("'\" ")
        if "permissions violation" in text.lower():
            self._denied = text
            for batch in self._batches:
                batch.moved.set()

    async def _note_end(self) -> None:
        self.ended.set()
        for batch in self._batches:
            batch.moved.set()
        for event in self.wakes:
            event.set()

    def _gone(self) -> UnavailableError:
        return UnavailableError(f"{self._address}: the connection was lost")

    async def close(self) -> None:
        """End it."""
        await self._note_end()
        if self._client is not None:
            # In the background: a server that hangs would keep us waiting here as well.
            await asyncio.wait((in_background(self._client.close()),), timeout=_GOODBYE)


@final
class NATSLink:
    """A connection that is opened when it is needed, and again after it was lost."""

    def __init__(self, address: NATSAddress) -> None:
        self.address: Final = address
        self._hosts = Hosts(address.hosts)
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._closed = False

    async def connected(self) -> Connection:
        """Return a connection that has not ended, as far as is known.

        Raises:
            UnavailableError: The server cannot be reached now.
            InvalidURLError: It does not let us.
        """
        if self._closed:
            raise UnavailableError(f"{self.address}: the connection was closed")
        connection = self._connection
        if connection is not None and not connection.ended.is_set():
            return connection
        if self._opening is None or self._opening.done():
            self._opening = asyncio.ensure_future(self._open())
            self._opening.add_done_callback(_note)
        # Shielded: others wait for it too.
        return await asyncio.shield(self._opening)

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection now, as far as is known."""
        return self._connection is not None and not self._connection.ended.is_set()

    async def ask(self, *questions: Question) -> list[Msg]:
        """Ask over whatever connection there is."""
        return await (await self.connected()).ask(questions)

    async def ask_as_one(self, questions: Sequence[Question]) -> Msg:
        """Ask for one answer to all of them, over whatever connection there is."""
        return await (await self.connected()).ask_as_one(questions)

    async def close(self) -> None:
        """Close it for good; what is under way fails."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait((self._opening,))
        if self._connection is not None:
            await self._connection.close()

    async def _open(self) -> Connection:
        before, self._connection = self._connection, None
        if before is not None:
            self._hosts.put_last(before.host)
            await before.close()
        connection = Connection(self.address)
        await connection.open(self._hosts)
        self._connection = connection
        return connection


def _note(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()  # whoever waited was told


def status_of(msg: Msg) -> str | None:
    """Return the status by which the server says that there is nobody, or nothing, there."""
    headers = msg.headers
    return None if not headers or msg.data else headers.get("Status")


def nobody_answered(answers: Iterable[Msg]) -> bool:
    """Tell whether one of several questions reached nobody."""
    return any(status_of(msg) == _NO_RESPONDERS for msg in answers)
