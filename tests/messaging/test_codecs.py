"""Typed bodies."""

import itertools

import msgspec
import pytest

from molva.messaging import Delivery, Message, RejectError, open_queue
from molva.messaging.codecs import BYTES, JSON, TEXT, Codec, JSONValue, struct

_names = itertools.count()


class Order(msgspec.Struct):
    item: str
    number: int


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (BYTES, b"\xff"),
        (TEXT, "größe"),
        (JSON, {"a": [1, 2.5, None, "é"]}),
        (struct(Order), Order("x", 2)),
    ],
)
def test_a_value_comes_back(codec: Codec[object], value: object) -> None:
    assert codec.decode(codec.message(value, key="k")) == value


@pytest.mark.parametrize(
    ("codec", "body"),
    [
        (TEXT, b"\xff"),
        (JSON, b"{"),
        (JSON, b"NaN"),
        (JSON, b"\xff"),
        (JSON, b"[" * 100_000),
        (JSON, b"9" * 5_000),
        (struct(Order), b'{"item": "x", "number": "two"}'),
        (struct(Order), b"[" * 100_000),
    ],
)
def test_a_body_that_cannot_be_decoded_is_rejected(codec: Codec[object], body: bytes) -> None:
    with pytest.raises(RejectError, match="cannot be decoded"):
        codec.decode(Message(body))


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(RejectError, match=r"number"):
        struct(Order).decode(Message(b'{"item": "x", "number": "two"}'))


def test_a_body_marked_as_something_else_is_rejected() -> None:
    with pytest.raises(RejectError, match="text/plain"):
        JSON.decode(TEXT.message("1"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_say_is_refused_before_it_is_sent(value: JSONValue) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the library's words
        JSON.message(value)


async def test_what_cannot_be_decoded_goes_to_the_dead_letters_and_stops_nobody() -> None:
    async with await open_queue(f"memory://codecs-{next(_names)}?queue=q") as queue:
        await queue.send_many([Message(b"{"), struct(Order).message(Order("lemon", 2))])
        got: list[Order] = []

        async def handle(order: Order, delivery: Delivery) -> None:
            got.append(order)
            queue.stop()

        await queue.run(struct(Order).handler(handle))
        assert got == [Order("lemon", 2)]
        [letter] = await queue.dead_letters()
        assert (letter.message.body, letter.attempts) == (b"{", 1)
