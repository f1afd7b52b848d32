"""The service's metrics, collected when somebody asks.

The paths that are measured only count in plain integers; turning these into Prometheus'
format happens here, once a scrape, so that measuring costs the fast lane nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Final, final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from molva.messaging import SendCounters, Topic, TopicStat
from molva.ratings.admission import bound_of
from molva.ratings.backlog import Backlog
from molva.ratings.intake import LATENCY_BUCKETS, Intake
from molva.ratings.siblings import Siblings, merged
from molva.ratings.spool import Spool

__all__ = ["Metrics"]


@final
class Metrics:
    """Turns what the parts have counted into metrics. Names and units are in docs/metrics.md.

    Args:
        topic: Tells the broker's topic; None as long as it was never reached.
        backlog: Asks it what waits.
        intake: What accepts them.
        subscription: Who takes them.
        siblings: The processes that share this one's port; None where it is alone.
        capacity: How many messages may wait, where the topic itself bounds nothing and tells
            how many do.
        spool: What keeps ratings while the broker is away; None where nothing does.
    """

    def __init__(
        self,
        topic: Callable[[], Topic | None],
        backlog: Backlog,
        intake: Intake,
        subscription: str,
        siblings: Siblings | None,
        *,
        capacity: int | None,
        spool: Spool | None = None,
    ) -> None:
        self._topic = topic
        self._backlog = backlog
        self._siblings = siblings
        self._capacity = capacity
        self._broker: Final = _OfBroker(subscription)
        process = None if siblings is None else siblings.process
        self._own: Final = CollectorRegistry(auto_describe=False)
        for collector in (
            _OfProcess(intake, topic),
            *(() if spool is None else (_OfSpool(spool),)),
            ProcessCollector(registry=None),
            PlatformCollector(registry=None),
        ):
            self._own.register(collector if process is None else _Labelled(collector, process))
        self._shared: Final = CollectorRegistry(auto_describe=False)
        self._shared.register(self._broker)
        if spool is not None:
            self._shared.register(_OfLeftOver(spool))

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format: of all siblings, and of the broker."""
        topic = self._topic()
        self._broker.capacity = None
        if topic is not None:
            self._broker.capacity = topic.capacity or bound_of(topic, self._capacity)
        self._broker.stat = await self._backlog.stat()
        others = [] if self._siblings is None else await self._siblings.others()
        return merged([self.own_text(), *others, generate_latest(self._shared)])

    def own_text(self) -> bytes:
        """Return what this process alone has counted."""
        return generate_latest(self._own)


class _Undescribed(Collector):
    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []


@final
class _Labelled(_Undescribed):
    """The metrics of another collector, each with the label ``process``."""

    def __init__(self, collector: Collector, process: str) -> None:
        self._collector = collector
        self._process = process

    def collect(self) -> Iterator[Metric]:
        for metric in self._collector.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "process": self._process})
                for sample in metric.samples
            ]
            yield metric


@final
class _OfProcess(_Undescribed):
    """What one process has counted."""

    def __init__(self, intake: Intake, topic: Callable[[], Topic | None]) -> None:
        self._intake = intake
        self._topic = topic

    def collect(self) -> Iterable[Metric]:
        yield from self._of_intake()
        yield from self._of_topic()

    def _of_intake(self) -> Iterator[Metric]:
        counters = self._intake.counters
        yield CounterMetricFamily(
            "molva_ratings_accepted", "Ratings answered with 202", counters.accepted
        )
        refused = CounterMetricFamily(
            "molva_requests_refused", "Requests refused, by the problem's slug", labels=["reason"]
        )
        for reason, count in sorted(counters.refused.items()):
            refused.add_metric([reason], count)
        yield refused
        yield CounterMetricFamily("molva_totals_read", "Reads of /total answered", counters.totals)
        bounds = [*map(str, LATENCY_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "molva_rate_duration_seconds",
            "Time from the head of an accepted rating to its answer",
            buckets=list(zip(bounds, accumulate(counters.latency), strict=True)),
            sum_value=counters.latency_seconds,
        )

    def _of_topic(self) -> Iterator[Metric]:
        topic = self._topic()
        counters = SendCounters() if topic is None else topic.counters
        yield CounterMetricFamily(
            "molva_messages_stored", "Messages that the broker confirmed", counters.stored
        )
        yield CounterMetricFamily(
            "molva_messages_failed", "Messages that the broker did not confirm", counters.failed
        )
        yield CounterMetricFamily(
            "molva_send_batches", "Calls to the broker that stored messages", counters.batches
        )
        yield CounterMetricFamily(
            "molva_send_busy_seconds", "Time spent in these calls", counters.busy_seconds
        )


@final
class _OfSpool(_Undescribed):
    """What one process keeps while the broker is away."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        spool = self._spool
        yield GaugeMetricFamily(
            "molva_broker_away", "1 while ratings go into the spool", float(spool.is_away)
        )
        yield GaugeMetricFamily("molva_spool_limit", "Ratings that the spool may hold", spool.limit)
        yield GaugeMetricFamily("molva_spool_length", "Ratings in the spool", spool.length)
        yield GaugeMetricFamily(
            "molva_spool_oldest_seconds", "Age of the oldest of these", spool.oldest_seconds
        )
        yield CounterMetricFamily(
            "molva_spool_stored", "Ratings that were stored in the spool", spool.stored
        )
        yield CounterMetricFamily(
            "molva_spool_refused", "Ratings that the spool had no room for", spool.refused
        )
        yield GaugeMetricFamily(
            "molva_spool_dead_letters",
            "Ratings that the broker refused for good",
            spool.dead_letters,
        )


@final
class _OfLeftOver(_Undescribed):
    """What lies in spools of processes that are gone. Every process would say the same."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "molva_spool_left_over",
            "Ratings in spools of processes that are gone, as of half a minute ago",
            self._spool.left_over,
        )
        yield GaugeMetricFamily(
            "molva_spool_unreadable",
            "Spools of processes that are gone that cannot be read",
            self._spool.unreadable,
        )


@final
class _OfBroker(_Undescribed):
    """What the broker holds, as of ``stat``. Every process would say the same."""

    def __init__(self, subscription: str) -> None:
        self._subscription = subscription
        self.capacity: int | None = None
        self.stat: TopicStat | None = None

    def collect(self) -> Iterator[Metric]:
        if self.capacity is not None:
            yield GaugeMetricFamily("molva_queue_capacity", "Messages that may wait", self.capacity)
        stat = self.stat and self.stat.subscriptions.get(self._subscription)
        if not stat:
            return
        yield GaugeMetricFamily(
            "molva_queue_pending", "Ratings accepted and not yet counted", stat.pending
        )
        yield GaugeMetricFamily(
            "molva_queue_oldest_seconds", "Age of the oldest of these", stat.oldest_seconds or 0.0
        )
        yield GaugeMetricFamily("molva_dead_letters", "Messages that were given up", stat.dead)
