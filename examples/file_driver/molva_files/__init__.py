"""Files driver: queues and topics in a folder, one file a message.

URL:
    ``files:///var/spool/app?queue=mails&lease=30``

    ``queue``, or ``topic`` and ``subscription``
        Folders inside the folder.
    ``lease``
        Seconds a consumer may hold a message before it comes back. Default 30.
    ``start``
        ``latest``: a subscription begins with what comes next.
    ``sync``
        ``yes`` (default) or ``no``, which survives no power cut and is quicker.

Delivery:
    At least once, oldest first. Survives kill and power: a send returns after the fsync
    of its files and of the folders that name them. Any number of processes on one host.

Design:
    A queue is a box: ``ready``, ``held`` and ``dead``, between which a message moves by a
    rename, which is atomic: of two consumers that rename one file, one finds it gone. The
    name of a held file says until when, so whoever looks may take back what ran out. A
    settlement names the held file exactly as it was when it was handed over or extended;
    where it is not there any more, the lease was lost.

    A topic is a folder of boxes, one a subscription. Sending writes one file and links it
    into each, so a subscription begins with what comes next.

    Consumers look 50 times a second. Being told by inotify is quicker and was left out: it
    would be half of this file.
"""

import dataclasses
from pathlib import Path
from typing import Final
from urllib.parse import quote

from molva.messaging import InvalidURLError, QueueNotFoundError, TopicNotFoundError
from molva.messaging.driver import Capabilities, Clock
from molva.messaging.url import BrokerURL, one_of, positive_number
from molva_files.box import Box, FilesConsumer, FilesQueue, FilesTopic

__all__ = [
    "QUEUE_CAPABILITIES",
    "QUEUE_OPTIONS",
    "TOPIC_CAPABILITIES",
    "TOPIC_OPTIONS",
    "open_queue",
    "open_subscription",
    "open_topic",
]

QUEUE_OPTIONS: Final = ("lease", "sync")
TOPIC_OPTIONS: Final = ("lease", "start", "sync")
_START: Final = one_of("earliest", "latest")
_SYNC: Final = one_of("yes", "no")
QUEUE_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",
    capacity="none",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=100_000_000,
    holding="lease",
    delay=True,
    attempts="exact",
)
TOPIC_CAPABILITIES: Final = Capabilities(
    delivery="at-least-once",
    ordering="in-process",
    capacity="none",
    survives=frozenset({"kill", "power"}),
    max_body_bytes=100_000_000,
    holding="lease",
    delay=True,
    attempts="exact",
    starts=frozenset({"latest"}),
    stat="none",  # nobody counts what all boxes together were ever sent
)


async def open_queue(url: BrokerURL, *, clock: Clock) -> FilesQueue:
    """Open a queue."""
    url.check_driver_options(QUEUE_OPTIONS)
    folder = _root(url) / "queues" / quote(url.queue or "", safe="")
    if url.create == "never" and not folder.exists():
        raise QueueNotFoundError(f"files: no queue {url.queue!r}, and create=never was asked")
    box = Box(folder, f"queue {url.queue}", clock, durable=_durable(url))
    return FilesQueue(box, _lease(url), _as_opened(url, QUEUE_CAPABILITIES))


async def open_topic(url: BrokerURL, *, clock: Clock) -> FilesTopic:
    """Open the sending side of a topic."""
    return FilesTopic(_topic(url), url.topic or "", clock, _as_opened(url, TOPIC_CAPABILITIES))


async def open_subscription(url: BrokerURL, *, clock: Clock) -> FilesConsumer:
    """Open one consumer of a subscription."""
    topic, name = _topic(url), url.subscription or ""
    folder = topic / quote(name, safe="")
    if url.create == "never" and not folder.exists():
        raise TopicNotFoundError(f"files: no subscription {name!r}, and create=never was asked")
    origin = f"topic {url.topic}, subscription {name}"
    box = Box(folder, origin, clock, durable=_durable(url))
    return FilesConsumer(box, _lease(url), _as_opened(url, TOPIC_CAPABILITIES))


def _topic(url: BrokerURL) -> Path:
    url.check_driver_options(TOPIC_OPTIONS)
    # Either side refuses what the other would. That a subscription cannot begin with the
    # earliest is refused above us, by what TOPIC_CAPABILITIES say of starts.
    _lease(url), _durable(url), url.option("start", _START, "latest")
    if url.topic is None:
        raise InvalidURLError(f"{url}: names no topic; add ?topic=ratings")
    folder = _root(url) / "topics" / quote(url.topic, safe="")
    if url.create == "never" and not folder.exists():
        raise TopicNotFoundError(f"files: no topic {url.topic!r}, and create=never was asked")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_opened(url: BrokerURL, best: Capabilities) -> Capabilities:
    return best if _durable(url) else dataclasses.replace(best, survives=frozenset({"kill"}))


def _durable(url: BrokerURL) -> bool:
    return url.option("sync", _SYNC, "yes") == "yes"


def _root(url: BrokerURL) -> Path:
    if url.host or len(url.path) < 2:
        raise InvalidURLError(f"{url}: files:// needs a folder: files:///var/spool/app")
    return Path(url.path)


def _lease(url: BrokerURL) -> float:
    return url.option("lease", positive_number, 30.0)
