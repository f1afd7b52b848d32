"""The servers that a run of tests shares answer as the servers that they are."""

import asyncpg
import nats
import redis
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic


def test_redis_confirms_only_what_is_in_its_log(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        assert client.config_get("appendonly", "appendfsync") == {
            "appendonly": "yes",
            "appendfsync": "always",
        }


async def test_nats_keeps_what_it_is_given_in_streams(nats_url: str) -> None:
    client = await nats.connect(nats_url)
    streams = client.jetstream()
    await streams.add_stream(name="tests-brokers", subjects=["tests.brokers"])
    assert (await streams.publish("tests.brokers", b"7")).seq == 1
    await streams.delete_stream("tests-brokers")
    await client.close()


async def test_postgresql_syncs_its_commits(postgresql_url: str) -> None:
    connection = await asyncpg.connect(postgresql_url)
    try:
        assert await connection.fetchval("SHOW fsync") == "on"
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
        assert await connection.fetchval("SELECT current_database()") == "molva"
    finally:
        await connection.close()


def test_kafka_makes_no_topic_that_nobody_asked_for(kafka_url: str) -> None:
    servers = {"bootstrap.servers": kafka_url.removeprefix("kafka://")}
    failed: list[str] = []
    producer = Producer({**servers, "topic.metadata.propagation.max.ms": 300})
    producer.produce(
        "misspelt", b"7", on_delivery=lambda error, _: failed.append(error.name() if error else "")
    )
    producer.flush(15)

    assert failed == ["UNKNOWN_TOPIC_OR_PART"]


def test_a_message_goes_through_kafka(kafka_url: str) -> None:
    servers = {"bootstrap.servers": kafka_url.removeprefix("kafka://")}
    topic = "tests-brokers-through"
    admin = AdminClient({**servers})
    admin.create_topics([NewTopic(topic, num_partitions=1)])[topic].result(10)
    producer = Producer({**servers, "enable.idempotence": True})
    producer.produce(topic, b"7")
    assert producer.flush(10) == 0

    consumer = Consumer({**servers, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    message = consumer.poll(20)
    consumer.close()

    assert message is not None
    assert message.value() == b"7"
