"""Independent streams of random numbers, one for each role in each replication.

A role has its stream to itself, and every arrival takes one number of each, whether it is
refused or not. So the job that comes as the thousandth has the same gap before it and the
same service time in two models under one seed, and what differs is the models: common random
numbers. The layout is part of a run's identity: ``docs/decisions`` says so.
"""

from enum import IntEnum
from typing import Final

import numpy as np

__all__ = ["Role", "Streams"]

# Streams that one role may need, as for the branch and the length of an H2 time.
_PARTS: Final = 4


class Role(IntEnum):
    """What a stream decides. Numbers are part of a run's identity; new ones come last."""

    ARRIVALS = 0
    SERVICE = 1
    CLASS = 2
    PATIENCE = 3
    ORDER = 4


class Streams:
    """The streams of one replication under one seed."""

    def __init__(self, seed: int, replication: int) -> None:
        self._seed = seed
        self._replication = replication

    def of(self, role: Role) -> list[np.random.Generator]:
        """Return the generators of ``role``, at their beginning."""
        return [
            np.random.Generator(
                np.random.SFC64(
                    np.random.SeedSequence(
                        self._seed, spawn_key=(self._replication, int(role), part)
                    )
                )
            )
            for part in range(_PARTS)
        ]
