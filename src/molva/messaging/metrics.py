"""Prometheus: what was counted by what is open, when somebody asks.

    from molva.messaging.metrics import MessagingCollector

    collector = MessagingCollector()
    collector.add(queue)      # a topic, subscription, queue, requester or responder
    prometheus_client.REGISTRY.register(collector)

Sending and receiving only count in plain integers; turning these into Prometheus' format
happens here, once a scrape. How much waits is asked of the broker, which is a call: ``await
collector.refresh()`` before a scrape, or now and then.

Needs ``pip install 'molva[prometheus]'``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, final

from molva.messaging.driver import QueueStat, SubscriptionStat, TopicStat
from molva.messaging.errors import MessagingError, MissingExtraError
from molva.messaging.queue import Queue
from molva.messaging.requester import Requester
from molva.messaging.responder import Responder
from molva.messaging.subscription import Subscription
from molva.messaging.topic import Topic

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise MissingExtraError(
        "molva.messaging.metrics needs a library: pip install 'molva[prometheus]'"
    ) from missing

__all__ = ["MessagingCollector"]

_LABELS: Final = ["system", "name"]

# Adding one here? Also docs/metrics.md, which a test compares.
_SENT: Final = {
    "stored": ("molva_messaging_stored", "Messages that the broker confirmed"),
    "refused_full": ("molva_messaging_refused_full", "Messages refused for want of room"),
    "dropped": ("molva_messaging_dropped", "Messages dropped for want of room, as was asked"),
    "failed": ("molva_messaging_failed", "Messages that the broker did not confirm"),
    "batches": ("molva_messaging_send_batches", "Calls to the broker that stored messages"),
    "busy_seconds": ("molva_messaging_send_busy_seconds", "Time spent in these calls"),
}
_RECEIVED: Final = {
    "received": ("molva_messaging_received", "Messages handed over"),
    "redelivered": ("molva_messaging_redelivered", "Of these, such as came again"),
    "acked": ("molva_messaging_acked", "Messages settled as done"),
    "nacked": ("molva_messaging_nacked", "Messages given back to be tried again"),
    "rejected": ("molva_messaging_rejected", "Messages that became dead letters"),
    "returned": ("molva_messaging_returned", "Messages given back that nobody had worked on"),
    "expired": ("molva_messaging_expired", "Messages whose time to live was over"),
    "lost": ("molva_messaging_leases_lost", "Settlements that came too late"),
    "handled": ("molva_messaging_handled", "Handlers that ran to their end"),
    "failed": ("molva_messaging_handlers_failed", "Handlers that raised"),
    "handler_seconds": ("molva_messaging_handler_seconds", "Time spent in handlers"),
    "unavailable": (
        "molva_messaging_receives_failed",
        "Receives that failed because the broker was away",
    ),
}
_ASKED: Final = {
    "asked": ("molva_messaging_asks", "Requests made"),
    "answered": ("molva_messaging_asks_answered", "Requests that had their answer"),
    "failed": ("molva_messaging_asks_failed", "Requests that were answered with an error"),
    "overdue": ("molva_messaging_asks_overdue", "Requests whose deadline passed"),
    "late": ("molva_messaging_replies_late", "Replies that nobody waited for any more"),
    "duplicates": ("molva_messaging_replies_duplicate", "Replies to what had been answered"),
    "others": ("molva_messaging_replies_of_others", "Replies to others, which were passed over"),
}
_ANSWERED: Final = {
    "answered": ("molva_messaging_requests_answered", "Requests whose answer is stored"),
    "failed": ("molva_messaging_requests_failed", "Requests that were answered with an error"),
    "overdue": (
        "molva_messaging_requests_overdue",
        "Requests that came after their deadline, and were not worked on",
    ),
    "unanswerable": (
        "molva_messaging_requests_unanswerable",
        "Requests whose reply topic is not there, which became dead letters",
    ),
}

_Opened = Topic | Subscription | Queue


@final
class MessagingCollector(Collector):
    """Collects from whatever was added.

    Where several of these have the same broker and name, they are told as one: a process that
    asks and answers by one queue has opened it twice.
    """

    def __init__(self) -> None:
        self._added: list[_Opened | Requester | Responder] = []
        self._stats: dict[int, TopicStat | SubscriptionStat | QueueStat | None] = {}

    def add(self, opened: _Opened | Requester | Responder) -> None:
        """Collect from this too; of a requester or responder, also from its ``requests``."""
        self._added.append(opened)

    def remove(self, opened: _Opened | Requester | Responder) -> None:
        """Collect from this no longer."""
        self._added.remove(opened)
        self._stats.pop(id(_place(opened)), None)

    async def refresh(self) -> None:
        """Ask the brokers how much waits."""
        for opened in self._opened:
            try:
                self._stats[id(opened)] = await opened.stat()
            except MessagingError:
                # Its gauges are missing, which is what an alert looks for.
                self._stats[id(opened)] = None

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        opened = self._opened
        requesters = [r for r in self._added if isinstance(r, Requester)]
        responders = [r for r in self._added if isinstance(r, Responder)]
        yield from _counters(
            _SENT, [(_labels(o), o.counters) for o in opened if isinstance(o, Topic | Queue)]
        )
        yield from _counters(
            _RECEIVED,
            [(_labels(o), o.received) for o in opened if isinstance(o, Subscription | Queue)],
        )
        yield from _counters(_ASKED, [(_labels(r.requests), r.counters) for r in requesters])
        yield from _counters(_ANSWERED, [(_labels(r.requests), r.counters) for r in responders])
        yield _gauge(
            "molva_messaging_asks_pending",
            "Requests that wait for their reply",
            _summed((_labels(r.requests), r.pending) for r in requesters),
        )
        yield from self._gauges()

    @property
    def _opened(self) -> list[_Opened]:
        return [_place(added) for added in self._added]

    def _gauges(self) -> Iterator[Metric]:
        # Whoever has the same thing open was told the same of it.
        stats = {
            labels: stat
            for opened in self._opened
            for labels, stat in _of(opened, self._stats.get(id(opened)))
        }
        yield _gauge(
            "molva_messaging_pending",
            "Messages waiting",
            {labels: stat.pending for labels, stat in stats.items()},
        )
        yield _gauge(
            "molva_messaging_dead_letters",
            "Dead letters",
            {labels: stat.dead for labels, stat in stats.items()},
        )
        yield _gauge(
            "molva_messaging_oldest_seconds",
            "Age of the oldest that waits",
            {labels: stat.oldest_seconds or 0.0 for labels, stat in stats.items()},
        )


# Values of _LABELS.
_Labels = tuple[str, str]


def _place(added: _Opened | Requester | Responder) -> _Opened:
    return added.requests if isinstance(added, Requester | Responder) else added


def _labels(opened: _Opened) -> _Labels:
    return opened.system, opened.name


def _of(
    opened: _Opened, stat: TopicStat | SubscriptionStat | QueueStat | None
) -> Iterator[tuple[_Labels, SubscriptionStat | QueueStat]]:
    if isinstance(stat, TopicStat):
        for name, one in stat.subscriptions.items():
            yield (opened.system, f"{opened.name}/{name}"), one
    elif stat is not None:
        yield _labels(opened), stat


def _counters(
    table: Mapping[str, tuple[str, str]], counted: Sequence[tuple[_Labels, object]]
) -> Iterator[Metric]:
    """Yield a metric for each field of ``table``, with what each of ``counted`` has in it."""
    for field, (name, help_) in table.items():
        family = CounterMetricFamily(name, help_, labels=_LABELS)
        values = _summed((labels, getattr(counters, field)) for labels, counters in counted)
        for labels, value in values.items():
            family.add_metric(labels, value)
        yield family


def _gauge(name: str, help_: str, values: Mapping[_Labels, float]) -> Metric:
    family = GaugeMetricFamily(name, help_, labels=_LABELS)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _summed(values: Iterable[tuple[_Labels, float]]) -> dict[_Labels, float]:
    """Return the values, those of the same labels added: Prometheus refuses to see one twice."""
    sums: dict[_Labels, float] = {}
    for labels, value in values:
        sums[labels] = sums.get(labels, 0) + value
    return sums
