"""The pytest plugin, in a pytest of its own: its fixture, and what it says of a driver."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_MANUAL = Path(__file__).parent.parent.parent / "docs" / "messaging.md"

_DRIVER = """
import dataclasses
import pytest
from molva.messaging import Message
from molva.messaging.conformance import Harness, Suite, bodies, lacks, needs, offered, take

class MemoryHarness(Harness):
    idle_bound = 0.2
    virtual = True
    def base_url(self): return "memory://plugin"
    async def cut_connections(self): pass

class Few(Suite):
    kind = "queue"
    async def test_it_passes(self, h): pass
    @needs("node")
    async def test_it_has_no_nodes(self, h): raise AssertionError
    @lacks("delay")
    async def test_it_has_delays(self, h): raise AssertionError
    @offered("restart_broker")
    async def test_it_is_not_restarted(self, h): raise AssertionError
    async def test_it_makes_two_duplicates(self, h):
        h.count_duplicates(["a", "a", "b", "a"], most=2, why="kill")
    async def test_it_makes_more_than_it_may(self, h):
        EXTRA

@pytest.mark.asyncio
class TestMemory(Few):
    @pytest.fixture
    def harness(self): return MemoryHarness()
"""


def _pytest(folder: Path, text: str) -> "subprocess.CompletedProcess[str]":
    (folder / "test_it.py").write_text(text)
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"),
            *("-o", "asyncio_default_fixture_loop_scope=function", "."),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_driver_is_summed_up_in_a_line(tmp_path: Path) -> None:
    result = _pytest(tmp_path, _DRIVER.replace("EXTRA", "pass"))

    [line] = [line for line in result.stdout.splitlines() if line.startswith("memory queue: ")]
    assert line == (
        "memory queue: 3 passed, 2 skipped by capability (has delay, no node), "
        "2 duplicates (kill), none beyond what is declared, offered: cut_connections, "
        "not offered: restart_broker; an idle consumer may take 0.2 s"
    )
    assert result.returncode == 0


def test_duplicates_beyond_what_is_declared_fail(tmp_path: Path) -> None:
    extra = 'h.count_duplicates("aab", most=0, why="acks")'
    result = _pytest(tmp_path, _DRIVER.replace("EXTRA", extra))

    assert "duplicates beyond what is declared, after acks: 1, and at most 0" in result.stdout
    assert "memory queue: 2 passed, 1 failed" in result.stdout
    assert "none beyond" not in result.stdout
    assert result.returncode == 1


def test_nothing_is_said_where_no_driver_was_tested(tmp_path: Path) -> None:
    result = _pytest(tmp_path, "def test_it(): pass")

    assert "conformance" not in result.stdout
    assert result.returncode == 0


def test_the_manuals_test_of_an_application_passes(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", _MANUAL.read_text(), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "molva_broker" in block]

    result = _pytest(tmp_path, block)

    assert "1 passed" in result.stdout, result.stdout


def test_a_test_that_wants_a_broker_has_one_of_its_own(tmp_path: Path) -> None:
    text = """
import pytest
from molva.messaging import Message, RejectError
from molva.messaging.sync import open_queue, open_subscription, open_topic

@pytest.mark.parametrize("turn", [1, 2])
def test_it(molva_broker, turn):
    with open_subscription(molva_broker.topic_url("t", subscription="s")) as subscription:
        with open_topic(molva_broker.topic_url("t")) as topic:
            topic.send_many([Message(b"good"), Message(b"bad")])
        for delivery in subscription.receive(9) + subscription.receive(9, wait=0.0):
            delivery.ack() if delivery.message.body == b"good" else delivery.reject("no")
        assert molva_broker.waiting("t", "s") == 0
    assert [m.body for m in molva_broker.sent("t")] == [b"good", b"bad"]
    assert [d.reason for d in molva_broker.dead_letters("t")] == ["no"]
    assert molva_broker.sent("nobody") == molva_broker.dead_letters("nobody") == []
    with open_queue(molva_broker.queue_url("q", lease=1)) as queue:
        queue.send(Message(b"1"))
        assert molva_broker.waiting("q") == 1
"""
    result = _pytest(tmp_path, text)

    assert "2 passed" in result.stdout, result.stdout


@pytest.mark.parametrize("module", ["molva.messaging.pytest_plugin", "molva.messaging"])
def test_the_plugin_imports_nothing_of_messaging_and_messaging_no_pytest(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(sys.modules), sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    loaded = set(result.stdout.split())
    if module == "molva.messaging":
        assert not {"pytest", "molva.messaging.testing"} & loaded
    assert not {name for name in loaded if name.startswith("molva.messaging.conformance")}
    assert not {name for name in loaded if name.startswith("molva.messaging.drivers.")}


def test_a_harness_is_closed_where_its_test_is_skipped_too(tmp_path: Path) -> None:
    text = _DRIVER.replace("EXTRA", "pass").replace(
        "async def cut_connections(self): pass",
        'async def close(self): await super().close(); open("closed", "a").write("x")',
    )
    result = _pytest(tmp_path, text)

    assert "3 passed, 3 skipped" in result.stdout
    assert (tmp_path / "closed").read_text() == "x" * 6
