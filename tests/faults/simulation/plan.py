"""What a seed stands for: a broker's habits, how much is asked, and what goes wrong when.

One seed in each part is for one kind of broker, and each kind of trouble comes often enough in
a few hundred seeds. A plan is drawn from the seed alone and never from what happens.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal, final

__all__ = ["ACTIVE_SECONDS", "BrokerPlan", "Fault", "Plan", "draw"]

# Virtual seconds in which clients begin new ratings and things go wrong.
ACTIVE_SECONDS: Final = 8.0

_KINDS: Final = ("kill", "pause", "restart", "power", "ledger", "poison", "catalog")
_WEIGHTS: Final = (6, 4, 3, 2, 2, 2, 1)


@final
@dataclass(frozen=True, slots=True)
class BrokerPlan:
    """A broker's habits; the probabilities are those of one call.

    Attributes:
        holding: How it hands over: a log whose lanes are owned, or a queue under leases.
        ordered: Whether it promises order per key.
        power_safe: Whether what it confirmed outlives a power cut.
        locks: Whether a lane is its owner's until that dies, or until it is not heard of.
        latency: Seconds that one way through the network takes at most, mostly.
        lease, session: Seconds that a message, or a lane, is held without a sign of life.
        capacity: Messages that may wait.
    """

    holding: Literal["lane", "lease"]
    ordered: bool
    power_safe: bool
    locks: bool
    lanes: int
    latency: float
    lease: float
    session: float
    capacity: int | None
    refused: float
    request_lost: float
    reply_lost: float
    forgets: float
    stores_twice: float


@final
@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at a moment, for a while, to one of a kind.

    Attributes:
        at_work: Whether a kill waits until its victim has begun with something.
    """

    at: float
    kind: str
    seconds: float
    role: Literal["serve", "work"]
    number: int
    at_work: bool


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed stands for.

    Attributes:
        handlers: Whether ratings are taken by handlers side by side, or by the worker in
            batches.
        servers, workers: Processes of each kind.
        clients: Tasks that rate, and ``ratings``: how often each does.
        disk: Whether the ledger's disk can fail and lose its power.
        commit: Where the ledger commits.
    """

    seed: int
    handlers: bool
    broker: BrokerPlan
    servers: int
    workers: int
    clients: int
    ratings: int
    items: int
    disk: bool
    commit: Literal["loop", "thread"]
    faults: tuple[Fault, ...]


def draw(seed: int) -> Plan:
    """Return what a seed stands for."""
    dice = random.Random(f"plan {seed}")
    holding: Literal["lane", "lease"] = dice.choice(("lane", "lane", "lease"))
    handlers = dice.random() < 0.3
    disk = dice.random() < 0.2
    workers = dice.randint(1, 3)
    broker = BrokerPlan(
        holding=holding,
        ordered=holding == "lane",
        power_safe=dice.random() < 0.7,
        locks=dice.random() < 0.5,
        lanes=dice.choice((1, 2, 3, 5)),
        latency=dice.choice((0.001, 0.01, 0.03)),
        lease=dice.choice((0.6, 1.5, 3.0)),
        session=dice.choice((1.6, 3.0)),
        capacity=dice.choice((None, None, 2, 5)),
        refused=dice.choice((0.0, 0.03)),
        request_lost=dice.choice((0.0, 0.03)),
        reply_lost=dice.choice((0.0, 0.05)),
        forgets=dice.choice((0.0, 0.1)),
        stores_twice=dice.choice((0.0, 0.15)),
    )
    faults = []
    # A disk that can fail does so: that is what it is there for.
    chosen = ["fsync"] if disk else []
    chosen += dice.choices(_KINDS, _WEIGHTS, k=dice.randint(2, 6))
    for kind in chosen:
        role: Literal["serve", "work"] = dice.choice(("serve", "work", "work"))
        faults.append(
            Fault(
                at=round(dice.uniform(0.05, ACTIVE_SECONDS), 3),
                kind=kind,
                seconds=round(dice.uniform(0.1, 4.0), 3),
                role=role,
                number=dice.randrange(3),
                at_work=dice.random() < 0.6,
            )
        )
    return Plan(
        seed=seed,
        handlers=handlers,
        broker=broker,
        servers=dice.randint(1, 2),
        workers=workers,
        clients=dice.randint(1, 3),
        ratings=dice.randint(2, 5),
        items=dice.randint(1, 3),
        disk=disk,
        commit=dice.choice(("loop", "loop", "thread")),
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
    )
