"""The whole path on a virtual clock: thousands of runs, each of them one seed.

The code under test is the product's own: intake, batcher, lanes, leases, retries, worker, and
the ledger on a real SQLite file. What it stands on is ours, and does what the seed says:

    loop      the event loop: virtual time, several processes, kills and pauses
    plan      what a seed stands for
    broker    the server of a broker that is late, forgets, repeats, restarts, loses power
    drivers   its drivers: a log with lanes, a queue with leases
    disk      the ledger's disk, which can fail its fsync and lose its power
    service   HTTP processes and workers
    clients   who rates, tries again under the same id, and reads totals
    run       one run, from its seed to its verdict; the judge is that of the live runs

``python -m tests.faults.simulation SEED`` shows what happened in a run.
"""
