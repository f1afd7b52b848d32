"""Which error ends a command with which code."""

import contextlib
import os

import pytest

from molva.cli.exits import IN_USE, UNAVAILABLE, USAGE, translated_errors
from molva.cli.running import READY_PIPE, tell_parent_ready
from molva.messaging import (
    DeadlineExceededError,
    InUseError,
    MessagingError,
    UnavailableError,
    UnsupportedFeatureError,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InUseError("two consumers hold it"), IN_USE),
        (UnsupportedFeatureError("it does not tell what waits", feature="stat"), USAGE),
        (UnavailableError("nobody listens there"), UNAVAILABLE),
        (DeadlineExceededError(b"1" * 16, timeout=1.0), UNAVAILABLE),
    ],
)
def test_each_error_of_a_broker_has_its_code(
    error: MessagingError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, translated_errors():
        raise error

    assert ended.value.code == code
    assert capsys.readouterr().err == f"molva: {error}\n"


def test_a_parent_that_never_reads_holds_up_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    try:
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"\0" * 4096)
        os.set_blocking(writer, True)
        monkeypatch.setenv(READY_PIPE, str(writer))

        tell_parent_ready()  # as every process that is started again does
    finally:
        os.close(reader)
