"""Kafka without a server: names, options, records, and what is never shown."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva.messaging import InvalidURLError, Message
from molva.messaging.driver import DeadLetter
from molva.messaging.drivers._kafka_options import KafkaOptions, Names
from molva.messaging.drivers._kafka_records import (
    TOMBSTONE,
    Record,
    dead_letter_of,
    message_of,
    messages_of,
    record_of,
    record_of_dead,
)
from molva.messaging.url import BrokerURL

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NAMES = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=200)


class Consumed:
    """A record as confluent-kafka hands it over."""

    def __init__(self, record: Record, *, partition: int = 3, offset: int = 7) -> None:
        self._record, self._at = record, (partition, offset)

    def topic(self) -> str:
        return self._record.topic

    def partition(self) -> int:
        return self._at[0]

    def offset(self) -> int:
        return self._at[1]

    def key(self) -> bytes | None:
        return self._record.key

    def value(self) -> bytes | None:
        return self._record.value

    def headers(self) -> list[tuple[str, Any]] | None:
        return list(self._record.headers) or None


def foreign(**fields: Any) -> Consumed:
    return Consumed(Record(**{"topic": "t", "key": None, "value": b"v", "headers": [], **fields}))


@given(
    body=st.binary(max_size=50),
    key=st.none() | TEXT,
    headers=st.dictionaries(TEXT, TEXT, max_size=4),
    ttl=st.none() | st.floats(0.001, 1e6),
)
def test_a_message_is_the_same_after_its_record(
    body: bytes, key: str | None, headers: dict[str, str], ttl: float | None
) -> None:
    message = Message(body, key=key, headers=headers, ttl=ttl)

    assert message_of(Consumed(record_of("t", message))) == message


def test_records_read_by_the_batch_are_the_same_messages() -> None:
    ours = [Message(b"1"), Message(b"2", key="λ"), Message(b"3", headers={"a": "b"}, ttl=2.0)]
    [id_] = [(name, value) for name, value in record_of("t", ours[0]).headers]
    others = [
        foreign(),
        foreign(key=b"\xff"),
        Consumed(Record("t", None, None, [])),
        Consumed(Record("t", None, None, [id_])),
        Consumed(Record("t", b"\xff", b"v", [id_])),
        Consumed(Record("t", None, b"v", [("molva-id", b"short")])),
    ]

    assert messages_of([*(Consumed(record_of("t", m)) for m in ours), *others]) == [
        *ours,
        *map(message_of, others),
    ]


@pytest.mark.parametrize("name", ["", "a\0b", "molva-id", "molva-ttl", "molva-headers", "plain"])
def test_a_header_may_have_any_name(name: str) -> None:
    record = record_of("t", Message(b"", headers={name: "λ"}))

    assert message_of(Consumed(record)).headers == {name: "λ"}
    assert all(header and "\0" not in header for header, _ in record.headers)


@given(message_key=st.none() | TEXT, reason=TEXT, headers=st.dictionaries(TEXT, TEXT, max_size=3))
def test_a_dead_letter_is_the_same_after_its_record(
    message_key: str | None, reason: str, headers: dict[str, str]
) -> None:
    message = Message(b"\0\xff", key=message_key, headers=headers, ttl=3.5)
    letter = DeadLetter(message, reason, 3, 17, "topic t, subscription s", 11)

    record = record_of_dead("t.s.dead", b"place", letter)

    assert dead_letter_of(Consumed(record), "topic t, subscription s") == letter
    assert record.key == b"place"


def test_a_record_of_somebody_else_has_the_same_id_each_time() -> None:
    ids = {message_of(foreign()).id for _ in range(3)}

    assert len(ids) == 1
    assert message_of(Consumed(Record("t", None, b"v", []), offset=8)).id not in ids


def test_a_key_that_is_no_text_is_shown_with_its_odd_bytes() -> None:
    assert message_of(foreign(key=b"k\xff\x00")).key == "k\\xff\0"


def test_a_tombstone_is_an_empty_body_that_says_so() -> None:
    message = message_of(foreign(value=None, key=b"k"))

    assert (message.body, message.headers) == (b"", {TOMBSTONE: "true"})


def test_headers_of_somebody_else_are_read_as_well_as_can_be() -> None:
    message = message_of(foreign(headers=[("a", b"1"), ("b", None), ("c", b"\xff")]))

    assert message.headers == {"a": "1", "b": "", "c": "\\xff"}


@pytest.mark.parametrize(
    "marks",
    [
        [("molva-id", b"short")],
        [("molva-id", None)],
        [("molva-id", b"sixteen bytes it"), ("molva-ttl", b"soon")],
        [("molva-id", b"sixteen bytes it"), ("molva-ttl", b"nan")],
        [("molva-id", b"sixteen bytes it"), ("molva-ttl", b"-1")],
        [("molva-id", b"sixteen bytes it"), ("molva-ttl", None)],
        [("molva-id", b"sixteen bytes it"), ("molva-headers", b"{")],
        [("molva-id", b"sixteen bytes it"), ("molva-headers", b"[1]")],
        [("molva-id", b"sixteen bytes it"), ("molva-headers", b'{"b": 1}')],
    ],
)
def test_a_mark_that_is_none_of_ours_is_a_header_like_others(
    marks: list[tuple[str, bytes | None]],
) -> None:
    message = message_of(foreign(headers=[*marks, ("a", b"1")]))

    shown = {name: "" if content is None else content.decode() for name, content in marks}
    assert message.headers == {**shown, "a": "1"}
    assert message.id != b"sixteen bytes it"


@pytest.mark.parametrize("name", ["ratings", "a.b_c-D9", "x" * 200])
def test_a_name_that_kafka_takes_is_its_name(name: str) -> None:
    assert Names.of(name).topic == name


@given(st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=6, unique=True))
def test_odd_names_are_legal_and_never_meet(pairs: list[tuple[str, str]]) -> None:
    found = [Names.of(*pair) for pair in pairs]
    every = [name for names in found for name in (names.dead, names.retry)]
    every += {names.topic for names in found}

    assert all(len(name) <= 249 and name not in (".", "..") for name in every)
    assert all(c.isascii() and (c.isalnum() or c in "._-") for name in every for c in name)
    assert len(set(every)) == len(every)
    assert len({names.group for names in found}) == len(pairs)


@pytest.mark.parametrize(
    ("one", "other"),
    [(("a.b", "c"), ("a", "b.c")), (("λ", "s"), ("molva-x-_ce_bb", "s")), (("a", "b"), ("a", "B"))],
)
def test_names_that_look_alike_stay_apart(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert Names.of(*one).dead != Names.of(*other).dead


@given(NAMES, NAMES)
def test_a_group_tells_its_subscription(topic: str, subscription: str) -> None:
    group = Names.of(topic, subscription).group

    assert Names.subscription_of(group) == subscription
    assert group.startswith(Names.groups_of(topic))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("kafka:///?topic=t", "names no server"),
        ("kafka://h/t?topic=t", "nothing of Kafka is in a path"),
        ("kafka://h?topic=t&ca=/nowhere", "says nothing without tls=on"),
        ("kafka://h?topic=t&tls=on&ca=/nowhere", "cannot be read"),
        ("kafka://h?topic=t&sasl=plain", "needs a user"),
        ("kafka://h?topic=t&sasl=kerberos", "plain"),
        ("kafka://h?topic=t&lanes=63", "1 to 62"),
        ("kafka://h?topic=t&session=0.5", "1 second"),
        ("kafka://h?topic=t&fetch_wait=2", "0 to 1 second"),
        ("kafka://h?topic=t&fetch_wait=soon", "0 to 1 second"),
        ("kafka://h?topic=t&leese=1", "unknown option 'leese'"),
    ],
)
def test_a_url_that_cannot_be_used_says_what_would_be(
    url: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOLVA_KAFKA_USERNAME", raising=False)

    with pytest.raises(InvalidURLError, match=problem):
        KafkaOptions.of(BrokerURL.parse(url))


def test_every_host_has_a_port() -> None:
    options = KafkaOptions.of(BrokerURL.parse("kafka://a,b:1,[::1],[::1]:2?topic=t"))

    servers = options.connection["bootstrap.servers"]
    assert servers == "a:9092,b:1,[::1]:9092,[::1]:2"


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLVA_KAFKA_USERNAME", "ann")
    monkeypatch.setenv("MOLVA_KAFKA_PASSWORD", "s3cret")

    options = KafkaOptions.of(BrokerURL.parse("kafka://h?topic=t&tls=on&sasl=scram-sha-512"))

    shown = {name: options.connection[name] for name in ("security.protocol", "sasl.mechanism")}
    assert shown == {"security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512"}
    assert (options.connection["sasl.username"], options.connection["sasl.password"]) == (
        "ann",
        "s3cret",
    )
    assert "s3cret" not in repr(options)


def test_a_password_in_a_line_of_librdkafka_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    options = KafkaOptions.of(BrokerURL.parse("kafka://ann:s3cret@h?topic=t"))

    with caplog.at_level("DEBUG"):
        options.log.log(10, "FAIL [%s]: %s", "thread", "no s3cret at kafka://bob:other@h")

    assert caplog.messages == ["FAIL [thread]: no *** at kafka://bob:***@h"]
