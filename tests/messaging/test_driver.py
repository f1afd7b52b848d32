"""What drivers hand over by the column."""

import pytest

from molva.messaging import Message
from molva.messaging.driver import FirstDeliveries, RawDelivery

MESSAGES = [Message(b"%d" % n) for n in range(4)]


@pytest.fixture
def taken() -> FirstDeliveries:
    return FirstDeliveries(MESSAGES, [(n,) for n in range(4)], [10, 20, 30, 40])


def test_columns_are_a_sequence_of_first_hand_overs(taken: FirstDeliveries) -> None:
    assert len(taken) == 4
    assert list(taken) == [RawDelivery(MESSAGES[n], 1, (n,), 10 * (n + 1)) for n in range(4)]
    assert taken[-1].token == (3,)


def test_a_part_of_columns_is_columns(taken: FirstDeliveries) -> None:
    part = taken[1:3]

    assert isinstance(part, FirstDeliveries)
    assert [raw.stored_at_us for raw in part] == [20, 30]


def test_no_columns_are_nothing() -> None:
    assert not FirstDeliveries([], [], [])
