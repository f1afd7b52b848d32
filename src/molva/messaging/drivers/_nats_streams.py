"""Streams and consumers of JetStream: made, found, compared with what they must be.

A field that is not set is set by the server, to another value in another version. So every
field that matters is set here, and compared where what is there was made by somebody else, or
was changed since: a consumer that gives up after a number of deliveries, or acknowledges by
itself, loses messages without a word.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, final

from nats.aio.msg import Msg

from molva.messaging.drivers._nats_link import NATSLink, Question, status_of
from molva.messaging.drivers._nats_messages import Names
from molva.messaging.errors import (
    IncompatibleBrokerError,
    InvalidURLError,
    MessagingError,
    UnavailableError,
)

__all__ = [
    "APIError",
    "Consumer",
    "JetStream",
    "NoLeaderError",
    "Stream",
    "age_of",
    "consumer_settings",
    "error_of",
    "kept_settings",
    "shown_settings",
    "stream_settings",
]

_logger: Final = logging.getLogger("molva.messaging")

# Seconds within which a message that is sent again is known again. Longer than anybody tries
# one send; a longer one costs the server memory for each id.
_DUPLICATES: Final = 120.0

# Messages that all consumers of a subscription may hold, with what waits for its delay. It
# bounds the server's memory; a subscription that reaches it stands still.
_MAX_ACK_PENDING: Final = 1_000_000
# Receives that may wait at a time, of all consumers of a subscription.
_MAX_WAITING: Final = 8_192

_NS: Final = 1_000_000_000

# The setting of a stream that takes messages which are stored as one, from NATS 2.12 on.
_BATCHES: Final = "allow_atomic"

# Error codes of the server.
_STREAM_NOT_FOUND: Final = 10059
_CONSUMER_NOT_FOUND: Final = 10014
_MESSAGE_NOT_FOUND: Final = 10037
_NOT_ENABLED: Final = (10039, 10076)
_NAME_IN_USE: Final = 10058
_NO_CLUSTER: Final = 10074
# Of a consumer that was made meanwhile, by another that wanted it otherwise.
_ALREADY_THERE: Final = (10148, 10105, 10013, 10012)


@final
class APIError(MessagingError):
    """What the server said to a question: for whoever asked, who may know what it means."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


@final
@dataclass(frozen=True, slots=True)
class Stream:
    """A stream, as it was found.

    Attributes:
        created: When it was made: another stream of its name is another one.
        last: The sequence number of what was stored last.
        messages: How many are stored.
        settings: What it was set to.
    """

    created: str
    first: int
    last: int
    messages: int
    settings: Mapping[str, Any]

    @property
    def stored(self) -> int:
        """How many messages were ever stored."""
        return max(0, self.last - max(0, int(self.settings.get("first_seq") or 1) - 1))

    @property
    def replicas(self) -> int:
        """How many copies there are."""
        return int(self.settings.get("num_replicas") or 1)

    @property
    def takes_batches(self) -> bool:
        """Whether messages may be stored as one: all of them, or none."""
        return bool(self.settings.get(_BATCHES))

    @property
    def is_numbered(self) -> bool:
        """Whether it was told its first number."""
        return int(self.settings.get("first_seq") or 0) > 1

    def throws_away(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings by which it deletes what nobody has settled."""
        found = self.settings
        odd = {} if found.get("discard") == wanted["discard"] else {"discard": found.get("discard")}
        if found.get("max_age"):
            odd["max_age"] = found["max_age"]
        # All messages are of one subject, and the oldest of a subject makes room for a new one.
        most = found.get("max_msgs_per_subject") or -1
        if most > 0 and most != wanted["max_msgs_per_subject"]:
            odd["max_msgs_per_subject"] = most
        return odd

    @property
    def in_file(self) -> bool:
        """Whether it is on a disk."""
        return self.settings.get("storage") == "file"


@final
@dataclass(frozen=True, slots=True)
class Consumer:
    """A consumer, as it was found.

    Attributes:
        pending: Messages that it has not handed over.
        held: Messages handed over and not settled, or given back.
        floor: The sequence number up to which all is settled.
        waiting: Receives that wait for a message.
        moved: Numbers that change whenever something is handed over or settled.
        settings: What it was set to.
    """

    name: str
    created: str
    pending: int
    held: int
    floor: int
    waiting: int
    moved: tuple[int, int]
    settings: Mapping[str, Any]

    @property
    def lease(self) -> float:
        """Seconds that a message is held."""
        return float(self.settings["ack_wait"]) / _NS

    @property
    def name_of(self) -> str:
        """What its subscription is called."""
        return _name_in(self.settings)

    def differs_from(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that are not as they must be: those that lose or hide messages."""
        found = self.settings
        odd = {
            name: found.get(name)
            for name in _MUST_BE
            if (found.get(name) or None) != (wanted.get(name) or None)
        }
        # None is the server's own, and -1 no bound.
        odd |= {
            name: found[name] for name in _AT_LEAST if 0 < (found.get(name) or 0) < wanted[name]
        }
        return odd | {name: found[name] for name in _MUST_NOT_BE if found.get(name)}


# What of a consumer must be as it was made. Its lease may be another's.
_MUST_BE: Final = ("ack_policy", "max_deliver", "filter_subject", "replay_policy")
# Less, and consumers wait for each other.
_AT_LEAST: Final = ("max_ack_pending",)
_MUST_NOT_BE: Final = (
    *("backoff", "headers_only", "pause_until", "inactive_threshold", "deliver_subject"),
    *("filter_subjects", "max_batch", "max_expires", "max_bytes", "mem_storage", "rate_limit_bps"),
    "priority_groups",
)


def stream_settings(
    names: Names, *, replicas: int, first: int | None = None, batches: bool = False
) -> dict[str, Any]:
    """Return the settings of the stream of a topic or a queue.

    ``first``: its first sequence number. One that no earlier stream of this name can have
    reached, so that an acknowledgement of then means nothing now; None where the server cannot be
    told, or loses such a stream. ``batches``: whether messages may be stored as one.
    """
    return {
        **({} if first is None else {"first_seq": first}),
        **({_BATCHES: True} if batches else {}),
        "name": names.stream,
        "description": _described(names.kind, names.name),
        "subjects": [names.subject],
        # A topic's is a log: what nobody subscribes to stays, and where the only consumer is
        # deleted by mistake nothing goes with it. What all have settled is deleted by us.
        "retention": "workqueue" if names.kind == "queue" else "limits",
        "storage": "file",
        "num_replicas": replicas,
        # What does not fit is refused, and nothing that waits is thrown away for it.
        "discard": "new",
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_msgs_per_subject": -1,
        "max_consumers": -1,
        "no_ack": False,
        "duplicate_window": round(_DUPLICATES * _NS),
        "allow_direct": False,
        "sealed": False,
        "deny_delete": False,
        "deny_purge": False,
        "allow_rollup_hdrs": False,
    }


def kept_settings(names: Names, *, replicas: int) -> dict[str, Any]:
    """Return the settings of the stream of what is kept beside: dead letters, attempts."""
    return {
        **stream_settings(names, replicas=replicas),
        "name": names.kept_stream,
        "description": _described(f"{names.kind}-kept", names.name),
        "subjects": [names.kept_subjects],
        "retention": "limits",
        # Stored again, a dead letter replaces itself; it is never refused.
        "max_msgs_per_subject": 1,
    }


def consumer_settings(names: Names, lease: float, *, start: str = "earliest") -> dict[str, Any]:
    """Return the settings of the consumer of a subscription or a queue."""
    return {
        "durable_name": names.consumer,
        "description": _described("subscription", names.consumer_name),
        "deliver_policy": "all" if start == "earliest" else "new",
        "ack_policy": "explicit",
        "ack_wait": max(1, round(lease * _NS)),
        # Never by the server, which would leave the message where it is and tell nobody.
        "max_deliver": -1,
        "max_ack_pending": _MAX_ACK_PENDING,
        "max_waiting": _MAX_WAITING,
        "filter_subject": names.subject,
        "replay_policy": "instant",
        "num_replicas": 0,
    }


def _described(kind: str, name: str) -> str:
    return json.dumps({"molva": kind, "name": name})


def _name_in(settings: Mapping[str, Any]) -> str:
    """Return what something is called by us: its own name may hold no more than letters."""
    try:
        return str(json.loads(settings.get("description") or "")["name"])
    except (ValueError, KeyError, TypeError):
        return str(settings.get("durable_name") or settings.get("name"))


class NoLeaderError(UnavailableError):
    """Consumers of a cluster have no leader now, and are in no list."""


@final
class JetStream:
    """Asks a server about streams and consumers."""

    def __init__(self, link: NATSLink) -> None:
        self._link = link

    async def ask(self, what: str, question: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to one question.

        Raises:
            APIError: The server said no.
            IncompatibleBrokerError: It has no JetStream.
        """
        [answer] = await self.ask_many([(what, question)])
        if isinstance(answer, APIError):
            raise answer
        return answer

    async def ask_many(
        self, questions: Iterable[tuple[str, Mapping[str, Any] | None]]
    ) -> list[dict[str, Any] | APIError]:
        """Return the answers to several questions, asked together."""
        answers = await self._link.ask(
            *(
                Question(f"$JS.API.{what}", b"" if asked is None else json.dumps(asked).encode())
                for what, asked in questions
            )
        )
        return [self._read(answer) for answer in answers]

    def _read(self, answer: Msg) -> dict[str, Any] | APIError:
        if status_of(answer) is not None:
            raise IncompatibleBrokerError(
                f"{self._link.address}: JetStream is not enabled there; start the server with a "
                "block jetstream {…}, or ask for delivery=at-most-once"
            )
        found: dict[str, Any] = json.loads(answer.data)
        if "error" not in found:
            return found
        code, text = error_of(found)
        if code in _NOT_ENABLED:
            raise IncompatibleBrokerError(
                f"{self._link.address}: {text}; enable JetStream for this account, or ask for "
                "delivery=at-most-once"
            )
        return APIError(code, f"{self._link.address}: {text}")

    # Streams ----------------------------------------------------------------------------

    async def stream(self, name: str) -> Stream | None:
        """Return a stream; None where there is none."""
        try:
            return _stream(await self.ask(f"STREAM.INFO.{name}"))
        except APIError as error:
            if error.code == _STREAM_NOT_FOUND:
                return None
            raise self.explained(error) from error

    async def ensure_stream(self, wanted: Mapping[str, Any]) -> Stream:
        """Return a stream, made if it is not there; what is there must be what it is to be."""
        found = await self.stream(str(wanted["name"]))
        if found is None:
            try:
                found = _stream(await self.ask(f"STREAM.CREATE.{wanted['name']}", wanted))
            except APIError as error:
                if error.code != _NAME_IN_USE:
                    raise self.explained(error) from error
                found = await self.stream(str(wanted["name"]))
                if found is None:
                    raise self.explained(error) from error
        self._check(found, wanted)
        if wanted.get(_BATCHES) and not found.takes_batches:
            return await self._let_batches_in(found)
        return found

    async def _let_batches_in(self, found: Stream) -> Stream:
        """Have a stream of an earlier server or version take batches, where we may change it."""
        settings = {**found.settings, _BATCHES: True}
        try:
            return _stream(await self.ask(f"STREAM.UPDATE.{settings['name']}", settings))
        except (APIError, InvalidURLError) as error:
            _logger.info("nats: stream %r takes no batches: %s", settings["name"], error)
            return found

    def _check(self, found: Stream, wanted: Mapping[str, Any]) -> None:
        """Refuse a stream that would lose what it is given."""
        settings = found.settings
        odd = found.throws_away(wanted)
        odd |= {
            name: settings.get(name)
            for name in ("retention", "subjects")
            if settings.get(name) != wanted[name]
        }
        odd |= {name: True for name in ("no_ack", "sealed") if settings.get(name)}
        if odd:
            raise IncompatibleBrokerError(
                f"{self._link.address}: stream {wanted['name']!r} was set up by somebody else and "
                f"would not keep what it is given ({shown_settings(odd)}); choose a prefix=, or "
                "correct it"
            )

    # Consumers --------------------------------------------------------------------------

    async def consumer(self, stream: str, name: str) -> Consumer | None:
        """Return a consumer; None where there is none."""
        try:
            return _consumer(await self.ask(f"CONSUMER.INFO.{stream}.{name}"))
        except APIError as error:
            if error.code in (_CONSUMER_NOT_FOUND, _STREAM_NOT_FOUND):
                return None
            raise self.explained(error) from error

    async def consumers(self, stream: str) -> list[Consumer]:
        """Return all consumers of a stream.

        Raises:
            NoLeaderError: Some of them do not answer.
        """
        found: list[Consumer] = []
        while True:
            try:
                page = await self.ask(f"CONSUMER.LIST.{stream}", {"offset": len(found)})
            except APIError as error:
                if error.code == _STREAM_NOT_FOUND:
                    return []
                raise self.explained(error) from error
            some = [_consumer(one) for one in page.get("consumers") or ()]
            found += some
            if missing := page.get("missing"):
                # In a cluster it answers without those whose leader does not.
                raise NoLeaderError(
                    f"{self._link.address}: consumers {', '.join(missing)} of stream {stream!r} do "
                    "not answer; they have no leader now"
                )
            if not some or len(found) >= page["total"]:
                return found

    async def put_consumer(self, stream: str, wanted: Mapping[str, Any]) -> Consumer:
        """Make a consumer, or give the one that is there these settings."""
        what = f"CONSUMER.DURABLE.CREATE.{stream}.{wanted['durable_name']}"
        try:
            return _consumer(await self.ask(what, {"stream_name": stream, "config": dict(wanted)}))
        except APIError as error:
            if error.code in _ALREADY_THERE:
                found = await self.consumer(stream, str(wanted["durable_name"]))
                if found is not None and not found.differs_from(wanted):
                    return found
            raise self.explained(error) from error

    async def delete_consumer(self, stream: str, name: str) -> bool:
        """Delete a consumer; return whether there was one."""
        try:
            await self.ask(f"CONSUMER.DELETE.{stream}.{name}")
        except APIError as error:
            if error.code in (_CONSUMER_NOT_FOUND, _STREAM_NOT_FOUND):
                return False
            raise self.explained(error) from error
        return True

    # Messages ---------------------------------------------------------------------------

    async def purge(self, stream: str, **which: object) -> int:
        """Delete messages: of a subject (``filter``), before a sequence number (``seq``)."""
        try:
            return int((await self.ask(f"STREAM.PURGE.{stream}", which))["purged"])
        except APIError as error:
            if error.code == _STREAM_NOT_FOUND:
                return 0
            raise self.explained(error) from error

    async def messages(
        self, stream: str, which: Sequence[Mapping[str, object]]
    ) -> list[dict[str, Any] | None]:
        """Return stored messages, as the server describes them; None for each that is not."""
        answers = await self.ask_many((f"STREAM.MSG.GET.{stream}", one) for one in which)
        found: list[dict[str, Any] | None] = []
        for answer in answers:
            if not isinstance(answer, APIError):
                found.append(answer["message"])
            elif answer.code in (_MESSAGE_NOT_FOUND, _STREAM_NOT_FOUND):
                found.append(None)
            else:
                raise self.explained(answer) from answer
        return found

    async def delete_message(self, stream: str, sequence: int) -> None:
        """Delete one message; one that is gone is no matter."""
        try:
            await self.ask(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence, "no_erase": True})
        except APIError as error:
            if error.code not in (_MESSAGE_NOT_FOUND, _STREAM_NOT_FOUND, 10057, 10043):
                raise self.explained(error) from error

    async def count(self, stream: str, subjects: str) -> int:
        """Return how many messages there are under subjects, of which each has one."""
        number = 0
        while True:
            try:
                asked = {"subjects_filter": subjects, "offset": number}
                answer = await self.ask(f"STREAM.INFO.{stream}", asked)
            except APIError as error:
                if error.code == _STREAM_NOT_FOUND:
                    return 0
                raise self.explained(error) from error
            some = len(answer["state"].get("subjects") or ())
            number += some
            if not some or number >= int(answer.get("total") or 0):
                return number

    def explained(self, error: APIError) -> MessagingError:
        """Return what an error means, for people."""
        if error.code == _NO_CLUSTER:
            return InvalidURLError(f"{error}; leave replicas= out, or name servers of a cluster")
        return UnavailableError(str(error))


def shown_settings(settings: Mapping[str, object]) -> str:
    """Return settings of a stream or consumer as errors and the log show them."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def error_of(answer: Mapping[str, Any]) -> tuple[int, str]:
    """Return the code and the text of an error that a server answered with."""
    error = answer["error"]
    return int(error.get("err_code") or error.get("code") or 0), str(error.get("description"))


def age_of(time: str, now_us: int) -> float:
    """Return the seconds since a time that the server wrote."""
    return max(0.0, now_us / 1e6 - _seconds(time))


def _seconds(time: str) -> float:
    # Nanoseconds, which Python does not read.
    head, _, rest = time.partition(".")
    whole = datetime.fromisoformat(head.rstrip("Z") + "+00:00").timestamp()
    digits = "".join(c for c in rest if c.isdigit())
    return whole + (float(f"0.{digits}") if digits else 0.0)


def _stream(answer: Mapping[str, Any]) -> Stream:
    state = answer["state"]
    return Stream(
        str(answer["created"]),
        int(state["first_seq"]),
        int(state["last_seq"]),
        int(state["messages"]),
        answer["config"],
    )


def _consumer(answer: Mapping[str, Any]) -> Consumer:
    return Consumer(
        str(answer["name"]),
        str(answer["created"]),
        int(answer["num_pending"]),
        int(answer["num_ack_pending"]),
        int(answer["ack_floor"]["stream_seq"]),
        int(answer.get("num_waiting") or 0),
        (int(answer["delivered"]["consumer_seq"]), int(answer["ack_floor"]["consumer_seq"])),
        answer["config"],
    )
