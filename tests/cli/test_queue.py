"""``molva queue`` on real files."""

import asyncio
import json
from functools import partial
from pathlib import Path

import pytest

from molva.cli.exits import UNAVAILABLE, USAGE
from molva.messaging import Message, open_queue, open_subscription, open_topic
from tests.cli import commands

run = partial(commands.run, "queue")


@pytest.fixture(params=["queue", "topic"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A queue or subscription with one message that waits and two dead letters."""
    base = f"sqlite://{tmp_path}/queue.db"
    messages = [Message(b"one"), Message(b"\xff"), Message(b"three", key="k", headers={"a": "b"})]

    async def fill() -> str:
        if request.param == "queue":
            url = f"{base}?queue=mails"
            async with await open_queue(url) as queue:
                await queue.send_many(messages)
                for delivery in await queue.receive(2):
                    await delivery.reject("bad address")
            return url
        url = f"{base}?topic=orders"
        async with (
            await open_topic(url) as topic,
            await open_subscription(f"{url}&subscription=billing") as subscription,
        ):
            await topic.send_many(messages)
            for delivery in await subscription.receive(2):
                await delivery.reject("bad address")
        return f"{url}&subscription=billing"

    return asyncio.run(fill())


def test_stat_tells_what_waits_and_what_is_dead(url: str) -> None:
    code, text = run("stat", url, "--json")
    [values] = json.loads(text).values()
    assert (code, values["pending"], values["dead"]) == (0, 1, 2)
    assert "pending 1" in run("stat", url)[1]


def test_peek_shows_what_waits_and_takes_nothing(url: str) -> None:
    for _ in range(2):
        _, text = run("peek", url, "--json")
        shown = json.loads(text)
        assert (shown["body"], shown["key"], shown["state"]) == ("three", "k", "ready")
        assert shown["headers"] == {"a": "b"}


def test_dead_shows_reasons_and_bodies_of_any_bytes(url: str) -> None:
    _, text = run("dead", url, "--json")
    first, second = map(json.loads, text.splitlines())
    assert (first["body"], first["reason"], first["attempts"]) == ("one", "bad address", 1)
    assert second["body_base64"] == "/w=="
    assert "bad address" in run("dead", url, "--limit", "1")[1]


def test_replay_sends_back_what_was_asked_for(url: str) -> None:
    id_ = json.loads(run("dead", url, "--json")[1].splitlines()[0])["id"]
    assert run("replay", url, "--id", id_) == (0, "1 dead letters wait again\n")
    assert run("replay", url) == (0, "1 dead letters wait again\n")
    assert run("dead", url) == (0, "no dead letters\n")
    assert len(run("peek", url, "--json")[1].splitlines()) == 3


def test_purge_asks_and_removes(url: str) -> None:
    code, text = run("purge", url)
    assert code == USAGE
    assert "--yes" in text
    assert run("purge", url, "--yes") == (0, "1 waiting messages removed\n")
    assert run("purge", url, "--yes", "--dead") == (0, "2 dead letters removed\n")
    [values] = json.loads(run("stat", url, "--json")[1]).values()
    assert (values["pending"], values["dead"]) == (0, 0)


def test_remove_removes_a_subscription_and_no_queue(url: str) -> None:
    code, text = run("remove", url)
    if "queue=" in url:
        assert code == USAGE
        assert "names no subscription" in text
    else:
        assert (code, text) == (0, "subscription billing removed\n")
        assert run("remove", url)[0] == USAGE


def test_looking_makes_nothing(tmp_path: Path) -> None:
    for command in ("stat", "peek", "dead", "replay"):
        code, text = run(command, f"sqlite://{tmp_path}/none.db?queue=mails")
        assert code in (USAGE, UNAVAILABLE)
        assert "missing" in text
    assert list(tmp_path.iterdir()) == []


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    code, text = run("stat", "sqlite://me:secret@host/queue.db?queue=mails")
    assert code == USAGE
    assert "secret" not in text
