"""Stations in LINE's simulator LDES: ``line_station.py CASE JOBS``, in its own environment."""

import json
import sys
import time

from line_solver import (
    LDES,
    Erlang,
    Exp,
    GlobalConstants,
    Lognormal,
    Network,
    OpenClass,
    Queue,
    SchedStrategy,
    Sink,
    Source,
    VerboseLevel,
)


def main() -> None:
    case, jobs = sys.argv[1], int(sys.argv[2])
    GlobalConstants.set_verbose(VerboseLevel.SILENT)
    model = Network("station")
    source = Source(model, "Source")
    queue = Queue(model, "Queue", SchedStrategy.FCFS)
    sink = Sink(model, "Sink")
    job = OpenClass(model, "Job")
    if case == "E2/LN/2/5":
        source.set_arrival(job, Erlang.fit_mean_and_order(1 / 2.2, 2))
        queue.set_service(job, Lognormal.fit_mean_and_scv(1.0, 1.5))
        queue.set_number_of_servers(2)
        queue.set_capacity(7)
        # Its budget counts services; 16 % of the arrivals are refused.
        events = round(jobs * 0.84)
    else:
        servers = {"M/M/1/inf": 1, "M/M/4/inf": 4}[case]
        source.set_arrival(job, Exp(0.9 * servers))
        queue.set_service(job, Exp(1.0))
        queue.set_number_of_servers(servers)
        events = jobs
    model.link(Network.serial_routing(source, queue, sink))
    started = time.perf_counter()
    table = LDES(model, seed=1, samples=events, numthreads=1, replications=1).avg_table()
    seconds = time.perf_counter() - started
    [stay] = [row["RespT"] for _, row in table.iterrows() if str(row["Station"]) == "Queue"]
    print(json.dumps({"seconds": seconds, "mean_wait": float(stay) - 1.0}))


if __name__ == "__main__":
    main()
