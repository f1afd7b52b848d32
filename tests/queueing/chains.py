"""Markov chains of small stations, for tests that take a second road."""

import math

import numpy
from numpy.typing import NDArray

__all__ = ["Matrix", "one_server", "phases", "stationary", "with_diagonal"]

Matrix = NDArray[numpy.float64]


def stationary(generator: Matrix) -> Matrix:
    """Return π with πQ = 0, by least squares."""
    size = len(generator)
    equations = numpy.vstack([generator.T, numpy.ones(size)])
    right = numpy.concatenate([numpy.zeros(size), [1.0]])
    solution: Matrix = numpy.linalg.lstsq(equations, right, rcond=None)[0]
    return solution


def with_diagonal(rates: Matrix) -> Matrix:
    generator: Matrix = rates - numpy.diag(rates.sum(axis=1))
    return generator


def phases(law: str) -> tuple[Matrix, Matrix]:
    """Return the start and the chain of a service time of mean 1."""
    if law == "E2(1s)":
        return numpy.array([1.0, 0.0]), numpy.array([[-2.0, 2.0], [0.0, -2.0]])
    rare = (1 - math.sqrt(3 / 5)) / 2  # H2 of scv 4
    return numpy.array([1 - rare, rare]), numpy.diag([-2 * (1 - rare), -2 * rare])


def one_server(arrival: float, law: str, q: int) -> tuple[Matrix, Matrix]:
    """Return the generator of M/PH/1/q without its refusals, and where it is in the long run."""
    start, chain = phases(law)
    leave = -chain.sum(axis=1)
    size = 1 + 2 * (q + 1)
    rates = numpy.zeros((size, size))
    rates[0, 1:3] = arrival * start
    for k in range(1, q + 2):
        here = slice(2 * k - 1, 2 * k + 1)
        rates[here, here] += chain - numpy.diag(numpy.diag(chain))
        if k <= q:
            rates[here, 2 * k + 1 : 2 * k + 3] += arrival * numpy.eye(2)
        if k == 1:
            rates[here, 0] += leave
        else:
            rates[here, 2 * k - 3 : 2 * k - 1] += numpy.outer(leave, start)
    generator = with_diagonal(rates)
    return generator, stationary(generator)
