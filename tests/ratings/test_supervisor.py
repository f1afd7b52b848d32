"""The supervisor, with small shell scripts as its children."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from molva.cli.supervising import supervise
from molva.ratings import supervisor
from molva.ratings.deployment import Deployment
from molva.ratings.supervisor import Child, Supervisor

# What a child does to end the test: its supervisor is told to stop, and so is it.
STOP = "kill -TERM $PPID; exec sleep 10"


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    wakeup = signal.set_wakeup_fd(-1)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    signal.set_wakeup_fd(wakeup)


@pytest.fixture(autouse=True)
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each child's first argument as a shell script."""
    path = tmp_path / "shell"
    path.write_text('#!/bin/sh\nshift 2\nexec sh -c "$1"\n')
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def ready() -> Iterator[int]:
    """A pipe that can be read: the service is ready from the beginning."""
    reader, writer = os.pipe()
    os.write(writer, b"x")
    yield reader
    os.close(reader)
    os.close(writer)


@pytest.fixture
def unready() -> Iterator[int]:
    reader, writer = os.pipe()
    yield reader
    os.close(reader)
    os.close(writer)


def until(name: str) -> str:
    """Return the command that waits for a file."""
    return f"while ! test -e {name}; do sleep 0.02; done"


def run(*scripts: str, ready: int | None, on_ready: Callable[[], None] = lambda: None) -> int:
    children = [Child(f"child {at}", [script]) for at, script in enumerate(scripts)]
    return Supervisor(children, inherit=(), environment={}, fatal=frozenset({2})).run(
        ready=ready, on_ready=on_ready
    )


# Fails once for an unknown reason, after ``{wait}``, and stops everything the second time.
FAILS_ONCE = f"if test -e flag; then {STOP}; fi; touch flag; {{wait}}; exit 1"


class TestUnknownFailures:
    def test_before_the_service_was_ready_one_ends_everything(self, unready: int) -> None:
        assert run("sleep 10", "exit 1", ready=unready) == 1

    def test_after_that_the_child_is_started_again(self, ready: int) -> None:
        def on_ready() -> None:
            Path("called").touch()

        script = FAILS_ONCE.format(wait=until("called"))

        assert run(script, ready=ready, on_ready=on_ready) == 0

    def test_where_nothing_tells_one_at_once_ends_everything(self) -> None:
        assert run("sleep 10", "exit 1", ready=None) == 1

    def test_where_nothing_tells_a_child_that_lived_is_started_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "_WELL_SECONDS", 0.2)

        assert run(FAILS_ONCE.format(wait="sleep 0.4"), ready=None) == 0

    def test_another_code_is_started_again_before_the_service_was_ready(self, unready: int) -> None:
        assert run(f"if test -e flag; then {STOP}; fi; touch flag; exit 3", ready=unready) == 0


def test_a_child_that_cannot_be_started_is_tried_again(
    ready: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, tries = subprocess.Popen, 0

    def popen(arguments: list[str], **options: object) -> object:
        nonlocal tries
        if arguments[-1] == "bad":
            tries += 1
            if tries == 3:
                Path("enough").touch()
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return start(arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", popen)

    assert run("bad", f"{until('enough')}; {STOP}", ready=ready) == 0

    said = capsys.readouterr().err
    assert "child 0 could not be started" in said
    assert "again in 0.2 s" in said
    assert "again in 0.4 s" in said


def test_a_failing_on_ready_ends_nothing(ready: int, capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    def on_ready() -> None:
        called.append(True)
        Path("called").touch()
        raise BrokenPipeError("nobody reads")

    assert run(f"{until('called')}; {STOP}", ready=ready, on_ready=on_ready) == 0
    assert called == [True]
    assert "nobody reads" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "wanted"), [(0, 0), (1, 1), (3, 1)])
def test_a_child_that_stops_badly_is_told(ready: int, code: int, wanted: int) -> None:
    script = f"trap 'exit {code}' TERM; kill -TERM $PPID; while :; do sleep 0.02; done"

    assert run(script, ready=ready) == wanted


def test_only_the_child_that_serves_can_say_that_it_is_ready(shell: Path, tmp_path: Path) -> None:
    shell.write_text(
        """#!/bin/sh
test -n "$MOLVA_READY_PIPE" && test -e "/proc/$$/fd/$MOLVA_READY_PIPE" && opened=opened
echo "${MOLVA_READY_PIPE:+named} $opened" > "$3.part"
# Into a file: a pipe of the shell's own might be open, or not any more.
ls "/proc/$$/fd" > "$3.files"
wc -l < "$3.files" >> "$3.part"
mv "$3.part" "$3.txt"
while ! test -e serve.txt || ! test -e work.txt; do sleep 0.02; done
kill -TERM $PPID
exec sleep 10
"""
    )

    code = supervise(
        [Child("serve", ["serve"]), Child("work 1", ["work"])],
        Deployment.in_folder(tmp_path),
        data=tmp_path,
        environment={},
    )

    assert code == 0
    *serve, serve_files = (tmp_path / "serve.txt").read_text().split()
    *work, work_files = (tmp_path / "work.txt").read_text().split()
    assert serve == ["named", "opened"]
    assert work == []
    assert int(work_files) == int(serve_files) - 1
