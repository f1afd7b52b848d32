"""OpenTelemetry: a span for each send and each handler, and the thread between them.

    from molva.messaging.telemetry import OpenTelemetry

    topic = await open_topic(url, tracing=OpenTelemetry())

The sender's context travels in the message's headers (``traceparent``, as the W3C's Trace
Context calls it), so that what a handler does is found in the trace of whoever sent. Names and
attributes are those of OpenTelemetry's conventions for messaging.

What ``send_many`` stores is one span of kind PRODUCER, whose context every message carries,
as the conventions have it where there is no span for the making of each; it tells how many
they were (``messaging.batch.message_count``). A span for each would cost as much as sending
them one by one.

Nothing is global here: what is opened with a tracer is traced, the rest pays nothing. A lone
send with a span costs some twenty microseconds more, three quarters of them the SDK's own;
``make bench`` has both figures.

Needs ``pip install 'molva[otel]'``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final, final

from molva._base.ids import format_id
from molva.messaging._tracing import Place
from molva.messaging.delivery import Delivery
from molva.messaging.errors import MissingExtraError
from molva.messaging.message import Message

try:
    from opentelemetry import propagate, trace
except ImportError as missing:
    raise MissingExtraError(
        "molva.messaging.telemetry needs a library: pip install 'molva[otel]'"
    ) from missing

__all__ = ["OpenTelemetry"]


@final
class OpenTelemetry:
    """Traces what is opened with it.

    Args:
        tracer_provider: Where spans go; None for the program's own.
    """

    def __init__(self, tracer_provider: trace.TracerProvider | None = None) -> None:
        self._tracer: Final = trace.get_tracer("molva.messaging", tracer_provider=tracer_provider)

    def sending(
        self, place: Place, messages: Sequence[Message]
    ) -> tuple[Sequence[Message], Callable[[BaseException | None], None]]:
        """Begin a span for what is sent, and put its context into every message."""
        attributes = _attributes(place, "send")
        if len(messages) == 1:
            attributes["messaging.message.id"] = format_id(messages[0].id)
        else:
            attributes["messaging.batch.message_count"] = len(messages)
        span = self._tracer.start_span(
            f"send {place.name}", kind=trace.SpanKind.PRODUCER, attributes=attributes
        )
        context: dict[str, str] = {}
        # Through the program's own propagators: which headers they are is its choice.
        propagate.inject(context, trace.set_span_in_context(span))
        carried = Message.carrying(messages, context)

        def finish(error: BaseException | None) -> None:
            if error is not None:
                span.record_exception(error)
                span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            span.end()

        return carried, finish

    @contextlib.contextmanager
    def processing(self, place: Place, delivery: Delivery) -> Iterator[None]:
        """Run a handler in a span of its own, below the sender's."""
        message = delivery.message
        attributes = _attributes(place, "process")
        attributes["messaging.message.id"] = format_id(message.id)
        attributes["messaging.message.body.size"] = len(message.body)
        attributes["messaging.message.delivery_attempt"] = delivery.attempt
        with self._tracer.start_as_current_span(
            f"process {place.name}",
            context=propagate.extract(message.headers),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes,
            # Several messages taken as one have several senders: one is the parent, and the
            # others are linked.
            links=[
                trace.Link(trace.get_current_span(propagate.extract(m.headers)).get_span_context())
                for m in delivery.messages[1:]
            ],
        ):
            yield


def _attributes(place: Place, operation: str) -> dict[str, str | int]:
    attributes: dict[str, str | int] = {
        "messaging.system": place.system,
        "messaging.destination.name": place.name,
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
    }
    if place.subscription is not None:
        attributes["messaging.destination.subscription.name"] = place.subscription
    return attributes
