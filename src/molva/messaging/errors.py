"""Every error that messaging raises, arranged by what the caller does next.

    MessagingError
    ├── InvalidURLError            correct the configuration
    ├── UnsupportedFeatureError    choose a driver that has the feature
    ├── MissingExtraError          install the driver's client library
    ├── NotFoundError
    │   ├── TopicNotFoundError     create the topic or subscription, or correct its name
    │   └── QueueNotFoundError     create the queue, or correct its name
    ├── IncompatibleBrokerError    upgrade, or point to another file or server
    ├── MessageTooLargeError       send less
    ├── QueueFullError             shed load, or wait
    ├── UnavailableError           try again later
    │   └── BrokenBrokerError      open it anew, in a new process
    ├── DeadlineExceededError      ask again, or give more time
    ├── RequestFailedError         correct the request, or look into the responder's log
    ├── LeaseLostError             drop the work: another consumer has it now
    ├── ClosedError                a bug in the calling code
    ├── ForkedError                open it in the process that uses it
    ├── InUseError                 stop the other consumers first
    ├── RejectError                raised *by* a handler: never try this message again
    └── SendManyError              some of a batch were not stored: see ``failures``

What the broker's client raised is always the ``__cause__``. A URL in a message never
shows its password.
"""

from collections.abc import Mapping
from typing import final

from molva._base.ids import format_id

__all__ = [
    "BrokenBrokerError",
    "ClosedError",
    "DeadlineExceededError",
    "ForkedError",
    "InUseError",
    "IncompatibleBrokerError",
    "InvalidURLError",
    "LeaseLostError",
    "MessageTooLargeError",
    "MessagingError",
    "MissingExtraError",
    "NotFoundError",
    "QueueFullError",
    "QueueNotFoundError",
    "RejectError",
    "RequestFailedError",
    "SendManyError",
    "TopicNotFoundError",
    "UnavailableError",
    "UnsupportedFeatureError",
]


class MessagingError(Exception):
    """Anything that messaging could not do."""


@final
class InvalidURLError(MessagingError, ValueError):
    """The URL cannot be used: its scheme, a part of it or an option is wrong."""


@final
class UnsupportedFeatureError(MessagingError):
    """The broker behind the URL cannot do what was asked for.

    Attributes:
        feature: What it cannot do, as ``Capabilities.features`` calls it.
        drivers: Schemes of the drivers that can.
    """

    def __init__(self, problem: str, *, feature: str, drivers: tuple[str, ...] = ()) -> None:
        can = ", ".join(f"{scheme}://" for scheme in drivers)
        super().__init__(f"{problem}; {can} can" if can else f"{problem}; no driver here can")
        self.feature = feature
        self.drivers = drivers


@final
class MissingExtraError(MessagingError, ImportError):
    """The driver's client library is not installed; the text names the extra."""


class NotFoundError(MessagingError, LookupError):
    """What the URL names does not exist and ``create=never`` was asked for."""


@final
class TopicNotFoundError(NotFoundError):
    """The topic or subscription does not exist and ``create=never`` was asked for."""


@final
class QueueNotFoundError(NotFoundError):
    """The queue does not exist and ``create=never`` was asked for."""


@final
class IncompatibleBrokerError(MessagingError):
    """The broker is newer than this Molva, damaged, or something else altogether."""


@final
class MessageTooLargeError(MessagingError, ValueError):
    """The broker takes no body of this size."""

    def __init__(self, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"a body of {size_bytes:,} bytes was refused: this broker takes {limit_bytes:,} at most"
        )
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


@final
class QueueFullError(MessagingError):
    """There is no room for the message; it was not stored."""

    def __init__(self, capacity: int) -> None:
        super().__init__(f"the queue holds its capacity of {capacity:,} messages; try again later")
        self.capacity = capacity


class UnavailableError(MessagingError):
    """The broker cannot be reached or cannot store now. Whether it stored is unknown."""


@final
class BrokenBrokerError(UnavailableError):
    """A write failed in a way after which this process may not write there again."""


@final
class DeadlineExceededError(MessagingError, TimeoutError):
    """No reply came in time. Whether the request was worked on, or will be, is unknown.

    Attributes:
        request_id: Id of the request.
        timeout: Seconds that were given.
    """

    def __init__(self, request_id: bytes, *, timeout: float) -> None:
        super().__init__(
            f"no reply to request {format_id(request_id)} came within {timeout:g} s; whether it "
            "was worked on is unknown"
        )
        self.request_id = request_id
        self.timeout = timeout


@final
class RequestFailedError(MessagingError):
    """The responder answered that it could not do what was asked.

    Attributes:
        request_id: Id of the request, which the responder's log names too.
        kind: Name of the error's class there: ``RejectError`` where the request is at fault.
        reason: What the responder wrote for the requester.
    """

    def __init__(self, request_id: bytes, *, kind: str, reason: str) -> None:
        super().__init__(f"request {format_id(request_id)} failed: {kind}: {reason}")
        self.request_id = request_id
        self.kind = kind
        self.reason = reason


@final
class LeaseLostError(MessagingError):
    """The delivery is no longer ours to settle; another consumer has the message or will."""

    def __init__(self, message_id: bytes, *, attempt: int) -> None:
        super().__init__(
            f"message {format_id(message_id)} (attempt {attempt}) is held by another consumer "
            "now, or was settled by it; drop the work"
        )
        self.message_id = message_id
        self.attempt = attempt


@final
class ClosedError(MessagingError):
    """It was used after ``close``."""


@final
class ForkedError(MessagingError):
    """It was opened in another process, of which this one is a fork.

    Connections, locks and threads do not outlive a fork. Open it again in the new process;
    the one of the old process goes on untouched.
    """


@final
class InUseError(MessagingError):
    """Other consumers hold what was to be changed; stop them first."""


@final
class RejectError(MessagingError):
    """Raised by a handler: this message can never be processed.

    It goes to the dead letters at once, with the text as its reason, instead of being tried
    again.
    """


@final
class SendManyError(MessagingError):
    """Some messages of a ``send_many`` were not stored; all others were.

    Attributes:
        failures: Position in the batch to the error of that message.
    """

    def __init__(self, failures: Mapping[int, MessagingError], total: int) -> None:
        first = next(iter(failures.values()))
        super().__init__(f"{len(failures):,} of {total:,} messages were not stored; first: {first}")
        self.failures = failures
