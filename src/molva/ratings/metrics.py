"""The service's metrics, collected when somebody asks.

The paths that are measured only count in plain integers; turning these into Prometheus'
format happens here, once a scrape, so that measuring costs the fast lane nothing.
"""

from collections.abc import Iterator
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

from molva.messaging import MessagingError, Topic, TopicStat
from molva.ratings.intake import LATENCY_BUCKETS, Intake

__all__ = ["Metrics"]


@final
class Metrics(Collector):
    """Turns what the parts have counted into metrics. Names and units are in docs/metrics.md."""

    def __init__(self, topic: Topic, intake: Intake, subscription: str) -> None:
        self._topic = topic
        self._intake = intake
        self._subscription = subscription
        self._stat: TopicStat | None = None
        self._registry: Final = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        try:
            self._stat = await self._topic.stat()
        except MessagingError:
            self._stat = None  # its gauges are missing, which is what an alert looks for
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of ours."""
        yield from self._of_intake()
        yield from self._of_topic()
        yield from self._of_broker()

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
        counters = self._topic.counters
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

    def _of_broker(self) -> Iterator[Metric]:
        if self._topic.capacity is not None:
            yield GaugeMetricFamily(
                "molva_queue_capacity", "Messages that may wait", self._topic.capacity
            )
        stat = self._stat and self._stat.subscriptions.get(self._subscription)
        if not stat:
            return
        yield GaugeMetricFamily(
            "molva_queue_pending", "Ratings accepted and not yet counted", stat.pending
        )
        yield GaugeMetricFamily(
            "molva_queue_oldest_seconds", "Age of the oldest of these", stat.oldest_seconds or 0.0
        )
        yield GaugeMetricFamily("molva_dead_letters", "Messages that were given up", stat.dead)
