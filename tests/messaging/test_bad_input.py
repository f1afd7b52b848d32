"""What callers get wrong that has no better place: one clear error each.

Most of it is asked of every driver, in ``conformance``; damaged files are in ``tests/faults``.
"""

import pytest

from molva.messaging import (
    InvalidURLError,
    Message,
    MissingExtraError,
    SendManyError,
    open_queue,
    open_topic,
    url,
)


async def test_an_option_of_another_driver_is_called_that() -> None:
    with pytest.raises(InvalidURLError, match=r"'vfs' is one of sqlite:// for a topic"):
        await open_topic("memory://x?topic=t&vfs=unix")


async def test_an_option_of_the_other_kind_is_called_that(tmp_path: object) -> None:
    with pytest.raises(InvalidURLError, match=r"'lanes' is one of sqlite:// for a topic"):
        await open_queue(f"sqlite://{tmp_path}/q.db?queue=q&lanes=4")


async def test_a_missing_client_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    drivers = {**url._DRIVERS, "owl": ("molva_has_no_such_library", "owl")}
    monkeypatch.setattr(url, "_DRIVERS", drivers)

    with pytest.raises(MissingExtraError, match=r"owl://.*pip install 'molva\[owl\]'"):
        await open_topic("owl://host?topic=t")


@pytest.mark.parametrize(
    "headers", [{"a": 1}, {"a": b"x"}, {1: "x"}, {"a": None}], ids=["int", "bytes", "name", "None"]
)
@pytest.mark.parametrize("scheme", ["memory://x", "sqlite://{}/q.db"])
async def test_headers_that_are_no_text_are_refused_before_anything_is_stored(
    headers: dict[str, str], scheme: str, tmp_path: object
) -> None:
    address = scheme.format(tmp_path)
    async with await open_queue(f"{address}?queue=q") as queue:
        with pytest.raises((TypeError, ValueError, SendManyError), match="header"):
            await queue.send(Message(b"x", headers=headers))

        stat = await queue.stat()

    assert stat is not None
    assert stat.pending == 0
