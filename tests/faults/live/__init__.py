"""The service in real processes, with real faults: kills, pauses, cut networks and power.

``python -m tests.faults.live run`` is one run, ``power`` cuts the power, ``long`` does both
until the numbers convince, ``pairs`` is the service scaled out. What each promises
is in its module:

    proxy       a TCP proxy that breaks connections
    client      an honest HTTP client, and the history of what it was told
    disk        file systems of our own: limited ones, and images that can lose their power
    fleet       the service's processes: start, kill, pause, start again
    launch      starts ``molva`` under a witness, with a wrong clock, or with a bug on purpose
    faults      what can go wrong, and a schedule of it drawn from a seed
    ledgers     what a ledger holds, read by roads of our own
    evidence    what broker and ledger hold when a run is over
    pair        which broker in front of which ledger, and the servers of both
    judge       that against what clients were told
    proof       the end of a run: drained, judged, verified, and all of it sent once more
    controller  one run from its seed to its verdict
    pairs       runs of what is scaled out, on each pair
    power       power cuts
    queues      a round of a queue with leases; its processes are in queue_actor, and
                queue_judge says what they have shown
    long        many runs, and one file of results
"""
