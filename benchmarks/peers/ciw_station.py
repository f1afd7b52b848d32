"""Stations in Ciw: ``ciw_station.py CASE JOBS``. Runs in an environment of its own."""

import json
import math
import sys
import time

import ciw


def main() -> None:
    case, jobs = sys.argv[1], int(sys.argv[2])
    room: float = math.inf
    if case == "E2/LN/2/5":
        spread = math.sqrt(math.log(1 + 1.5))
        arrivals = ciw.dists.Erlang(rate=2 * 2.2, num_phases=2)
        service = ciw.dists.Lognormal(mean=-(spread**2) / 2, sd=spread)
        servers, room = 2, 5
    else:
        servers = {"M/M/1/inf": 1, "M/M/4/inf": 4}[case]
        arrivals = ciw.dists.Exponential(rate=0.9 * servers)
        service = ciw.dists.Exponential(rate=1.0)
    network = ciw.create_network(
        arrival_distributions=[arrivals],
        service_distributions=[service],
        number_of_servers=[servers],
        queue_capacities=[room],
    )
    ciw.seed(1)
    simulation = ciw.Simulation(network)
    started = time.perf_counter()
    simulation.simulate_until_max_customers(jobs, method="Arrive")
    waits = [r.waiting_time for r in simulation.get_all_records() if r.record_type == "service"]
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mean_wait": sum(waits) / len(waits)}))


if __name__ == "__main__":
    main()
