"""The synchronous surface: generated, and the same promises from any thread."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from molva.messaging import (
    Action,
    ClosedError,
    InvalidURLError,
    LeaseLostError,
    Message,
    QueueFullError,
    SendManyError,
)
from molva.messaging._portal import portal
from molva.messaging.sync import Delivery, open_queue, open_subscription, open_topic

ROOT = Path(__file__).parent.parent.parent
_names = itertools.count()


@pytest.fixture(params=["memory", "sqlite"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://sync-{next(_names)}"
    return f"sqlite://{tmp_path}/queue.db"


def test_it_is_what_the_generator_writes() -> None:
    written = subprocess.run(
        [sys.executable, "-c", "from generate_sync import source; print(source(), end='')"],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (ROOT / "src/molva/messaging/sync.py").read_text() == written, (
        "run scripts/generate_sync.py"
    )


def test_what_is_sent_is_received_settled_and_gone(base: str) -> None:
    with open_queue(f"{base}?queue=q") as queue:
        queue.send(Message(b"1", key="k"))
        queue.send_many([Message(b"2"), Message(b"3"), Message(b"4")])
        first, second, third, fourth = queue.receive(10)
        assert first.message.key == "k"
        first.ack()
        second.nack()
        third.reject("bad")
        fourth.extend(60.0)
        queue.settle([(fourth, Action.ACK)])
        [again] = queue.receive()
        assert (again.message.body, again.attempt, again.redelivered) == (b"2", 2, True)
        again.ack()
        [letter] = queue.dead_letters()
        assert letter.reason == "bad"
        assert queue.replay() == 1
        assert [p.message.body for p in queue.peek()] == [b"3"]
        assert queue.purge() == 1
        stat = queue.stat()
        assert stat is not None
        assert (stat.pending, queue.counters.stored, queue.received.acked) == (0, 4, 3)


def test_a_topic_is_read_by_iterating(base: str) -> None:
    with (
        open_topic(f"{base}?topic=t") as topic,
        open_subscription(f"{base}?topic=t&subscription=s") as subscription,
    ):
        topic.send_many([Message(b"%d" % n, key="k") for n in range(5)])
        found = []
        for delivery in subscription:
            found.append(delivery.message.body)
            delivery.ack()
            if len(found) == 5:
                break
        assert found == [b"0", b"1", b"2", b"3", b"4"]
        subscription.stop()
        assert list(subscription) == []


def test_run_calls_blocking_handlers_side_by_side(base: str) -> None:
    with open_queue(f"{base}?queue=q&max_attempts=1") as queue:
        queue.send_many([Message(b"%d" % n) for n in range(8)])
        together = threading.Barrier(4, timeout=10)
        threads = set()
        lock = threading.Lock()
        done: list[bytes] = []

        def handle(delivery: Delivery) -> None:
            threads.add(threading.get_ident())
            together.wait()
            with lock:
                done.append(delivery.message.body)
                if len(done) == 8:
                    queue.stop()
            if delivery.message.body == b"3":
                raise OSError("poison")

        queue.run(handle, concurrency=4)
        assert sorted(done) == [b"%d" % n for n in range(8)]
        assert len(threads) == 4
        [letter] = queue.dead_letters()
        assert letter.reason == "OSError: poison"


def test_errors_are_those_of_the_asynchronous_classes(base: str) -> None:
    with pytest.raises(InvalidURLError):
        open_queue(f"{base}?queue=q&leese=3")
    with open_queue(f"{base}?queue=q&capacity=1") as queue:
        queue.send(Message(b"1"))
        with pytest.raises(QueueFullError):
            queue.send(Message(b"2"))
        with pytest.raises(SendManyError):
            queue.send_many([Message(b"2")])
        [delivery] = queue.receive()
        queue.purge()
        with pytest.raises(LeaseLostError):
            delivery.ack()
    queue.close()
    with pytest.raises(ClosedError):
        queue.receive()


def test_many_threads_share_one_queue(base: str) -> None:
    with open_queue(f"{base}?queue=q") as queue, ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda n: queue.send(Message(b"%d" % n)), range(400)))
        assert queue.counters.batches < 400  # what was sent at once travelled together
        found: list[int] = []

        def take(_: int) -> None:
            while deliveries := queue.receive(5, wait=0.0):
                for delivery in deliveries:
                    delivery.ack()
                    found.append(int(delivery.message.body))

        list(threads.map(take, range(16)))
        assert sorted(found) == list(range(400))


async def test_a_blocking_call_on_an_event_loop_is_refused(base: str) -> None:
    with pytest.raises(RuntimeError, match="use the class of the same name"):
        open_queue(f"{base}?queue=q")


def test_a_fork_says_so_and_can_open_anew(tmp_path: Path) -> None:
    program = f"""
import os, sys
from molva.messaging import ForkedError, Message
from molva.messaging.sync import open_queue

url = "sqlite://{tmp_path}/queue.db?queue=q"
queue = open_queue(url)
queue.send(Message(b"parent"))
child = os.fork()
if child == 0:
    try:
        queue.send(Message(b"lost"))
    except ForkedError as error:
        assert "open it anew" in str(error)
    else:
        os._exit(1)
    with open_queue(url) as own:
        own.send(Message(b"child"))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
print(*(d.message.body.decode() for d in queue.receive(5)))
queue.close()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stdout) == (0, "parent child\n"), result.stderr


def test_a_fork_does_not_hold_the_lanes_of_a_parent_that_died(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/queue.db?topic=t"
    program = f"""
import os, time
from molva.messaging.sync import open_subscription

subscription = open_subscription("{url}&subscription=s")
[delivery] = subscription.receive()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print("forked", flush=True)
time.sleep(60)
"""
    with open_topic(url) as topic:
        topic.send(Message(b"1"))
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "forked\n"
            try:
                os.kill(parent.pid, signal.SIGKILL)
                with open_subscription(f"{url}&subscription=s") as heir:
                    deadline = time.monotonic() + 5
                    while not (found := heir.receive(1, wait=0.3)):
                        assert time.monotonic() < deadline, "the child holds the lanes"
                    assert found[0].message.body == b"1"
            finally:
                os.killpg(parent.pid, signal.SIGKILL)


def test_an_interrupted_receive_ends_on_the_loop_too_and_takes_nothing(base: str) -> None:
    class InterruptedByTestError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptedByTestError

    with open_queue(f"{base}?queue=q") as queue:
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(InterruptedByTestError):
                queue.receive(1, wait=20.0)
        finally:
            signal.signal(signal.SIGALRM, before)

        queue.send(Message(b"1"))
        began = time.monotonic()
        [delivery] = queue.receive(1)
        delivery.ack()

    assert delivery.attempt == 1
    assert time.monotonic() - began < 5.0


def test_a_cancelled_call_raises_what_threads_know() -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CancelledError):
        portal().call(cancelled())
    assert portal().call(asyncio.sleep(0, "the loop goes on")) == "the loop goes on"


def test_what_is_kept_is_held_for_many_leases() -> None:
    with open_queue("memory://sync-keeping?queue=q&lease=0.2") as queue:
        queue.send(Message(b"7"))
        [held] = queue.receive()
        with queue.keeping([held]):
            assert queue.receive(wait=1.0) == []
            held.ack()
        assert queue.receive(wait=0.5) == []

        queue.send(Message(b"8"))
        held = queue.receive()[0]
        with queue.keeping([held]):
            pass
        [again] = queue.receive(wait=5.0)
        assert again.message.body == b"8"
        again.ack()
