"""Prometheus: what topics, subscriptions and queues have counted, when somebody asks.

    from molva.messaging.metrics import MessagingCollector

    collector = MessagingCollector()
    collector.add(queue)
    prometheus_client.REGISTRY.register(collector)

Sending and receiving only count in plain integers; turning these into Prometheus' format
happens here, once a scrape. How much waits is asked of the broker, which is a call: ``await
collector.refresh()`` before a scrape, or now and then.

Needs ``pip install 'molva[prometheus]'``.
"""

from collections.abc import Iterator
from typing import Final, final

from molva.messaging.driver import QueueStat, SubscriptionStat, TopicStat
from molva.messaging.errors import MessagingError, MissingExtraError
from molva.messaging.queue import Queue
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


@final
class MessagingCollector(Collector):
    """Collects from whatever was added."""

    def __init__(self) -> None:
        self._opened: list[Topic | Subscription | Queue] = []
        self._stats: dict[int, TopicStat | SubscriptionStat | QueueStat | None] = {}

    def add(self, opened: Topic | Subscription | Queue) -> None:
        """Collect from this too."""
        self._opened.append(opened)

    def remove(self, opened: Topic | Subscription | Queue) -> None:
        """Collect from this no longer."""
        self._opened.remove(opened)
        self._stats.pop(id(opened), None)

    async def refresh(self) -> None:
        """Ask the brokers how much waits."""
        for opened in list(self._opened):
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
        senders = [o for o in self._opened if isinstance(o, Topic | Queue)]
        receivers = [o for o in self._opened if isinstance(o, Subscription | Queue)]
        for field, (name, help_) in _SENT.items():
            family = CounterMetricFamily(name, help_, labels=_LABELS)
            for sender in senders:
                family.add_metric(_labels(sender), getattr(sender.counters, field))
            yield family
        for field, (name, help_) in _RECEIVED.items():
            family = CounterMetricFamily(name, help_, labels=_LABELS)
            for receiver in receivers:
                family.add_metric(_labels(receiver), getattr(receiver.received, field))
            yield family
        yield from self._gauges()

    def _gauges(self) -> Iterator[Metric]:
        pending = GaugeMetricFamily("molva_messaging_pending", "Messages waiting", labels=_LABELS)
        dead = GaugeMetricFamily("molva_messaging_dead_letters", "Dead letters", labels=_LABELS)
        oldest = GaugeMetricFamily(
            "molva_messaging_oldest_seconds", "Age of the oldest that waits", labels=_LABELS
        )
        for opened in self._opened:
            for labels, stat in _of(opened, self._stats.get(id(opened))):
                pending.add_metric(labels, stat.pending)
                dead.add_metric(labels, stat.dead)
                oldest.add_metric(labels, stat.oldest_seconds or 0.0)
        yield from (pending, dead, oldest)


def _labels(opened: Topic | Subscription | Queue) -> list[str]:
    return [opened.system, opened.name]


def _of(
    opened: Topic | Subscription | Queue, stat: TopicStat | SubscriptionStat | QueueStat | None
) -> Iterator[tuple[list[str], SubscriptionStat | QueueStat]]:
    if isinstance(stat, TopicStat):
        for name, one in stat.subscriptions.items():
            yield [opened.system, f"{opened.name}/{name}"], one
    elif stat is not None:
        yield _labels(opened), stat
