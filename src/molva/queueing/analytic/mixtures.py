"""A wait that is 0 or exponential, and an exponential service after it."""

import math

__all__ = ["sojourn_tail"]


def sojourn_tail(t: float, waiting: float, drain: float, service: float) -> float:
    """Return P(W + S > t), W exponential with rate ``drain`` where it is not 0."""
    # ∫ drain e^(−drain u) e^(−service (t−u)) du, the slower exponential taken out: what is left
    # neither overflows nor, where the two rates meet, divides by nothing.
    apart = abs(drain - service) * t
    shared = -math.expm1(-apart) / apart if apart > 0 else 1.0
    both = math.exp(-drain * t) + drain * t * math.exp(-min(drain, service) * t) * shared
    return waiting * both + (1 - waiting) * math.exp(-service * t)
