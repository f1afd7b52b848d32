"""How long a station remembers: what is left out at the beginning, and how long runs must be.

A run starts empty, and forgets that in multiples of the relaxation time. It is known for
M/M/1/inf and approximated elsewhere, by the diffusion that a busy station is like.
"""

import math
from typing import Final

from molva.queueing.model import Bulk, Model, Renewal, Sinusoid

__all__ = ["MEMORIES_LEFT_OUT", "memory_in_jobs"]

# Relaxation times that are left out at the beginning: what an empty start changed has then
# faded to e⁻¹⁰.
MEMORIES_LEFT_OUT: Final = 10


def memory_in_jobs(model: Model) -> float:
    """Return the relaxation time of ``model``, roughly, in arrivals.

    Source:
        1/(μ(1 − √ρ)²) of M/M/1/inf, which is 2(ca² + cs²)/(μ(1 − ρ)²) in heavy traffic for
        other distributions too; in a room of b places the slowest of the waves that fit,
        2b²/(π²σ²). Cohen, *The Single Server Queue* (1982); Abate and Whitt (1988).
    """
    arrival, service = model.arrivals, model.service
    gap_scv, batch = 1.0, 1
    if isinstance(arrival, Renewal):
        # Jobs that come together share a gap, so there is less to average.
        batch = arrival.batch
        gap_scv = float(arrival.gap.scv) * batch
    elif not isinstance(arrival, Sinusoid):
        gap_scv = float(arrival.gap.scv)
    size = service.limit if isinstance(service, Bulk) else 1
    service_scv = 0.0 if isinstance(service, Bulk) else float(service.scv)
    spread = (gap_scv + service_scv) / size
    load = model.offered_load
    # Jobs that come while one is served: even a station where nobody waits has that memory.
    least = load * size * (1 + service_scv) + batch
    if model.servers is None:
        return least
    utilisation = load / model.servers
    # A schedule may be loaded fully; it settles within a service or two.
    memory = math.inf if spread else 0.0
    if utilisation < 1:
        memory = 2 * spread * utilisation / (1 - utilisation) ** 2
    if model.waiting is not None:
        room = model.waiting + 1 + math.sqrt(model.servers)
        memory = min(memory, 2 * room**2 / (math.pi**2 * max(spread, 0.1)))
    if model.patience is not None:
        memory = min(memory, 3 * model.arrival_rate * float(model.patience.mean))
    return least + memory
