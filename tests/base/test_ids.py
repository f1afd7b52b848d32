"""Ids: unique, in order, laid out as RFC 9562 says."""

import os
import threading
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva._base.clock import ManualClock
from molva._base.ids import IdFactory, format_id, id_from_text, new_id, stamp_uuid8


def test_an_id_is_a_uuid_of_version_7_with_its_time() -> None:
    made = uuid.UUID(bytes=IdFactory(ManualClock(1_700_000_000_123_456))())

    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == 1_700_000_000_123


def test_ids_are_unique() -> None:
    assert len({new_id() for _ in range(100_000)}) == 100_000


def test_ids_of_one_factory_only_grow() -> None:
    ids = [new_id() for _ in range(20_000)]

    assert ids == sorted(ids)


def test_ids_grow_even_when_the_clock_goes_back() -> None:
    class Jumping:
        now = 1_700_000_000_000_000

        def now_us(self) -> int:
            return self.now

        def monotonic(self) -> float:
            return 0.0

        async def sleep(self, seconds: float) -> None: ...

    clock = Jumping()
    make = IdFactory(clock)
    ids = [make()]
    for jump in (1_000, -5_000_000, 0, 10, -86_400_000_000, 3_000):
        clock.now += jump
        ids += [make() for _ in range(10)]

    assert ids == sorted(set(ids))


def test_more_ids_than_a_millisecond_counts_stay_in_order() -> None:
    make = IdFactory(ManualClock())

    ids = [make() for _ in range(10_000)]

    assert ids == sorted(set(ids))
    assert {uuid.UUID(bytes=id_).version for id_ in ids} == {7}


def test_two_factories_at_one_moment_make_different_ids() -> None:
    clock = ManualClock()
    first, second = IdFactory(clock), IdFactory(clock)

    assert not {first() for _ in range(1_000)} & {second() for _ in range(1_000)}


def test_the_random_part_is_all_of_the_entropy() -> None:
    make = IdFactory(ManualClock(), lambda size: b"\xff" * size)

    assert make()[8:] == b"\xbf" + b"\xff" * 7


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_does_not_repeat_its_parents_ids() -> None:
    new_id()  # so that there is entropy to inherit
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"".join(new_id()[8:] for _ in range(100)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 10_000)
    os.close(reading)
    os.close(writing)

    ours = {new_id()[8:] for _ in range(600)}

    assert len(theirs) == 800
    assert not ours & {theirs[at : at + 8] for at in range(0, 800, 8)}


def test_threads_make_different_ids() -> None:
    made: list[list[bytes]] = [[] for _ in range(4)]

    def work(mine: list[bytes]) -> None:
        mine += [new_id() for _ in range(5_000)]

    threads = [threading.Thread(target=work, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({id_ for mine in made for id_ in mine}) == 20_000


@given(st.uuids())
def test_a_uuid_stands_for_itself_however_it_is_written(made: uuid.UUID) -> None:
    for text in (str(made), made.hex, str(made).upper()):
        assert id_from_text(text, scope="any") == made.bytes
    assert format_id(made.bytes) == str(made)


@pytest.mark.parametrize("text", ["order-1", "0190f0a0", "{0190f0a0}", "ключ", "a" * 500, "\0"])
def test_a_name_is_a_uuid_of_version_8(text: str) -> None:
    made = uuid.UUID(bytes=id_from_text(text, scope="s"))

    assert (made.version, made.variant) == (8, uuid.RFC_4122)


def test_a_name_is_the_same_everywhere_for_ever() -> None:
    # Clients retry across versions: this value must never change.
    assert id_from_text("order-1", scope="s").hex() == "2b2582770a8e807382f5dcce4292b8e5"


@given(st.text(min_size=1), st.text(min_size=1))
def test_a_name_in_another_scope_is_another_id(text: str, scope: str) -> None:
    try:
        text.encode(), scope.encode()
    except UnicodeEncodeError:
        return
    if len(text) < 32:
        assert id_from_text(text, scope=scope) != id_from_text(text, scope=scope + "x")


@given(st.binary(min_size=16, max_size=16))
def test_a_stamp_changes_the_version_and_the_variant_alone(raw: bytes) -> None:
    stamped = stamp_uuid8(raw)

    assert (uuid.UUID(bytes=stamped).version, len(stamped)) == (8, 16)
    kept = int.from_bytes(b"\xff" * 6 + b"\x0f\xff\x3f" + b"\xff" * 7, "big")
    assert int.from_bytes(raw, "big") & kept == int.from_bytes(stamped, "big") & kept
