"""Stations in SimPy: ``simpy_station.py CASE JOBS``. Runs in an environment of its own."""

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import simpy


def main() -> None:
    case, jobs = sys.argv[1], int(sys.argv[2])
    source = random.Random(1)
    if case == "E2/LN/2/5":
        spread = math.sqrt(math.log(1 + 1.5))
        servers, room = 2, 5.0

        def gap() -> float:
            return source.expovariate(4.4) + source.expovariate(4.4)

        def service() -> float:
            return source.lognormvariate(-(spread**2) / 2, spread)

    else:
        servers, room = {"M/M/1/inf": 1, "M/M/4/inf": 4}[case], math.inf

        def gap() -> float:
            return source.expovariate(0.9 * servers)

        def service() -> float:
            return source.expovariate(1.0)

    environment = simpy.Environment()
    resource = simpy.Resource(environment, capacity=servers)
    total, served = 0.0, 0

    def job() -> Iterator[Any]:
        nonlocal total, served
        came = environment.now
        with resource.request() as request:
            yield request
            total += environment.now - came
            served += 1
            yield environment.timeout(service())

    def arrivals() -> Iterator[Any]:
        for _ in range(jobs):
            yield environment.timeout(gap())
            if len(resource.queue) < room or resource.count < servers:
                environment.process(job())

    started = time.perf_counter()
    environment.process(arrivals())
    environment.run()
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mean_wait": total / served}))


if __name__ == "__main__":
    main()
