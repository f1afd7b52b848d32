"""One API for every message broker, opened by URL, with the same promises on each.

    topic = await open_topic("sqlite:///var/lib/app/queue.db?topic=orders")
    await topic.send(Message(b"..."))

    subscription = await open_subscription(
        "sqlite:///var/lib/app/queue.db?topic=orders&subscription=billing"
    )
    await subscription.run(handle, concurrency=8)

A topic is a log that any number of named subscriptions read; a queue (``open_queue``) hands
each message to one consumer, under a lease, in one of several orders. A requester
(``open_requester``) sends a message and waits for the one that answers it, which a responder
(``open_responder``) sends.

At least once by default, acknowledged when the handler has returned, retried with growing
delays when it raised, put among the dead letters in the end. Change the URL and the broker
changes; what brokers cannot all do is a field of ``Capabilities``.
"""

from molva.messaging.delivery import Delivery
from molva.messaging.driver import (
    Action,
    Capabilities,
    DeadLetter,
    Peeked,
    QueueStat,
    SubscriptionStat,
    TopicStat,
)
from molva.messaging.errors import (
    BrokenBrokerError,
    ClosedError,
    DeadlineExceededError,
    ForkedError,
    IncompatibleBrokerError,
    InUseError,
    InvalidURLError,
    LeaseLostError,
    MessageTooLargeError,
    MessagingError,
    MissingExtraError,
    NotFoundError,
    QueueFullError,
    QueueNotFoundError,
    RejectError,
    RequestFailedError,
    SendManyError,
    TopicNotFoundError,
    UnavailableError,
    UnsupportedFeatureError,
)
from molva.messaging.message import Message
from molva.messaging.queue import Queue, open_queue
from molva.messaging.requester import AskCounters, Requester, open_requester
from molva.messaging.responder import AnswerCounters, Responder, open_responder
from molva.messaging.subscription import ReceiveCounters, Subscription, open_subscription
from molva.messaging.topic import SendCounters, Topic, open_topic
from molva.messaging.url import with_options

__all__ = [
    "Action",
    "AnswerCounters",
    "AskCounters",
    "BrokenBrokerError",
    "Capabilities",
    "ClosedError",
    "DeadLetter",
    "DeadlineExceededError",
    "Delivery",
    "ForkedError",
    "InUseError",
    "IncompatibleBrokerError",
    "InvalidURLError",
    "LeaseLostError",
    "Message",
    "MessageTooLargeError",
    "MessagingError",
    "MissingExtraError",
    "NotFoundError",
    "Peeked",
    "Queue",
    "QueueFullError",
    "QueueNotFoundError",
    "QueueStat",
    "ReceiveCounters",
    "RejectError",
    "RequestFailedError",
    "Requester",
    "Responder",
    "SendCounters",
    "SendManyError",
    "Subscription",
    "SubscriptionStat",
    "Topic",
    "TopicNotFoundError",
    "TopicStat",
    "UnavailableError",
    "UnsupportedFeatureError",
    "open_queue",
    "open_requester",
    "open_responder",
    "open_subscription",
    "open_topic",
    "with_options",
]
