"""Published and independently computed values, each to the digits that its source supports."""

import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from molva.queueing import Model, SteadyState, analyse, course, erlang_b, erlang_c, load_at_loss
from molva.queueing.analytic import two_moments
from molva.queueing.analytic.renewal_arrivals import root
from molva.queueing.analytic.schedule import schedule

DATA = Path(__file__).parent.parent / "data" / "queueing_cases.json"
CASES = json.loads(DATA.read_text())["cases"]

Case = dict[str, Any]
Values = Mapping[str, float]


def number(value: str | float) -> Fraction:
    return Fraction(str(value))


def erlang_b_case(case: Case) -> Values:
    p = case["params"]
    if "B" in p:
        losses = p["B"] if isinstance(p["B"], list) else [p["B"]]
        loads = {f"A@{loss}": load_at_loss(loss, p["n"]) for loss in losses}
        return loads | ({"A": load_at_loss(p["B"], p["n"])} if len(losses) == 1 else {})
    return {"B": erlang_b(float(number(p["a"])), float(number(p["n"])))}


def erlang_c_case(case: Case) -> Values:
    p, id_ = case["params"], case["id"]
    if id_ == "EC-01":
        enough = min(n for n in range(21, 40) if erlang_c(20, n) <= 0.15)
        state = analyse(Model.parse(f"M({Fraction(20, 120)}/s)/M(120s)/26/inf"))
        assert state.mean_wait is not None
        low, high = 20.0, 30.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if erlang_c(middle, 30) < 0.15 else (low, middle)
        return {
            "n_min_15pct": enough,
            "C30": erlang_c(20, 30),
            "wait26": state.mean_wait,
            "a_30_15": high,
        }
    if id_ == "EC-03":
        rate = number(p["calls"]) / number(p["interval"])
        state = mm(rate, 1 / number(p["aht"]), p["n"], "inf")
        assert state.wait is not None
        return {
            "Pw": state.probability_of_waiting or 0.0,
            "SL": 1 - state.wait.tail(float(p["asa"])),
            "occ": state.utilisation or 0.0,
        }
    if "lam" in p:
        state = mm(number(p["lam"]), number(p["mu"]), p["n"], "inf")
        return standard(state)
    return {"Pw": erlang_c(p["a"], p["n"])}


def mm(arrival: Fraction, service: Fraction, n: int, q: str) -> SteadyState:
    return analyse(Model.parse(f"M({arrival}/s)/M({service}/s)/{n}/{q}"))


def standard(state: SteadyState) -> dict[str, float]:
    """Return what most cases ask for."""
    values = {
        "L": state.mean_in_system,
        "Lq": state.mean_waiting,
        "W": state.mean_time_in_system,
        "Wq": state.mean_wait,
        "Wq2": state.mean_squared_wait,
        "Pw": state.probability_of_waiting,
        "PK": state.loss_probability,
        "loss": state.loss_probability,
        "util": state.utilisation,
    }
    return {name: value for name, value in values.items() if value is not None}


def empty(state: SteadyState) -> float:
    """Return P(nobody is present) of a single server or of M/M/n/q."""
    model = state.model
    n, q = model.servers, model.waiting
    assert n is not None
    if n == 1:
        assert state.utilisation is not None
        return 1 - state.utilisation
    a = Fraction(model.arrivals.rate * model.service.mean)
    below = sum(a**k / math.factorial(k) for k in range(n + 1))
    rho = a / n
    room = rho / (1 - rho) if q is None else sum(rho**m for m in range(1, q + 1))
    return float(1 / (below + a**n / math.factorial(n) * room))


def mm_case(case: Case) -> Values:
    p, id_ = case["params"], case["id"]
    lam, mu = number(p["lam"]), number(p["mu"])
    state = mm(lam, mu, p.get("n", 1), str(p.get("q", "inf")))
    values = standard(state) | {"p0": empty(state)}
    n, a = p.get("n", 1), float(lam / mu)
    for k in (1, 2, 15):
        values[f"p{k}"] = empty(state) * (
            a**k / math.factorial(k) if k <= n else a**k / math.factorial(n) / n ** (k - n)
        )
    if id_ == "MM1-03":
        assert state.wait is not None
        values["P_W_gt_4"] = state.wait.tail(p["t"])
    if id_ == "MM1-05":
        values["Wq_p"] = state.wait_percentile(p["p"]) or 0.0
        values["Wq_var"] = values["Wq2"] - values["Wq"] ** 2
        values["sojourn_p"] = state.time_in_system_percentile(p["p"]) or 0.0
    return values


def with_tails(state: SteadyState, wanted: Values) -> Values:
    values = standard(state)
    assert state.wait is not None
    for name in wanted:
        if name.startswith("P(W>"):
            values[name] = state.wait.tail(float(name[4:-1]))
        if name.startswith("P(W<="):
            values[name] = 1 - state.wait.tail(float(name[5:-1]))
    return values


def mg1_case(case: Case) -> Values:
    p = case["params"]
    laws = {"MG1-03": "E2(1s)", "MG1-05": "H2(mean=1s,scv=4)", "MG1-07": "U(0s,2s)"}
    return with_tails(analyse(f"M({p['lam']}/s)/{laws[case['id']]}/1/inf"), case["values"])


def md_case(case: Case) -> Values:
    p = case["params"]
    n = p.get("n", 1)
    return with_tails(analyse(f"M({p['lam']}/s)/D({p['D']}s)/{n}/inf"), case["values"])


def mg1k_case(case: Case) -> Values:
    p = case["params"]
    law = {"MEK-01": "E2(1s)"}.get(case["id"], "D(1s)")
    state = analyse(f"M({p['lam']}/s)/{law}/{p['n']}/{p['q']}")
    return standard(state) | {"p0": empty(state)}


def gm_case(case: Case) -> Values:
    p = case["params"]
    lam = number(p["lam"])
    letter = case["model"].split("/")[0]
    arrivals = f"D({lam}/s)"
    if letter.startswith("E"):
        arrivals = f"{letter}({lam}/s)"
    elif letter == "H2":
        arrivals = f"H2(mean={lam}/s,scv={p['ca2']})"
    elif letter == "U(0,2":
        arrivals = f"U(0s,{2 / lam}s)"
    state = analyse(f"{arrivals}/M({p['mu']}/s)/{p['n']}/inf")
    return standard(state) | {"sigma": root(state.model)}


def dd_case(case: Case) -> Values:
    p = case["params"]
    model = Model.parse(f"D({p['a']}s)/D({p['s']}s)/{p['n']}/{p['q']}")
    state = analyse(model)
    assert state.mean_wait is not None
    return standard(state) | {
        "mean_wait": state.mean_wait,
        "period": float(schedule(model).period),
    }


def discipline_case(case: Case) -> Values:
    order = {"DIS-01": "fifo", "DIS-03": "random"}[case["id"]]
    p = case["params"]
    return standard(analyse(f"M({p['lam']}/s)/M({p['mu']}/s)/1/inf/{order}"))


def approximation_case(case: Case) -> Values:
    p = case["params"]
    moments = (p["lam"], p["es"], p["ca2"], p["cs2"])
    values = {
        "allen_cunneen": two_moments.allen_cunneen(*moments, p["n"]),
        "sakasegawa": two_moments.sakasegawa(*moments, p["n"]),
        "klb": two_moments.kraemer_langenbach_belz(*moments, p["n"]),
    }
    if p["n"] == 1:
        values["kingman"] = two_moments.kingman_bound(*moments)
        values["daley"] = two_moments.daley_bound(*moments)
    return values


def batch_case(case: Case) -> Values:
    p = case["params"]
    state = analyse(f"{p['EX']:.0f}*M({p['lam_batches']}/s)/M({p['mu']}/s)/1/inf")
    return standard(state) | {"rho": state.utilisation or 0.0}


def planner_case(case: Case) -> Values:
    """Return what a scan finds: the fewest servers, and then places, that are good enough."""
    p = case["params"]
    if case["id"] == "PLAN-01":
        return {"n": min(n for n in range(100, 140) if erlang_b(p["a"], n) <= p["B"])}
    if case["id"] == "PLAN-03":
        return {"n": min(n for n in range(25, 40) if answered(p, n) >= p["SL"])}
    n, q, state = next(
        (n, q, state)
        for n in range(20, 40)
        for q in range(60)
        if good_enough(state := mm(number(p["lam"]), number(p["mu"]), n, str(q)), p)
    )
    assert state.wait is not None
    return standard(state) | {"n": n, "q": q, "tail": state.wait.tail(p["T"])}


def answered(params: Values, n: int) -> float:
    """Return the share of calls that waits no longer than it may."""
    state = analyse(f"M({params['calls_per_h']}/h)/M({params['aht_s']}s)/{n}/inf")
    assert state.wait is not None
    return 1 - state.wait.tail(params["T_s"])


def good_enough(state: SteadyState, params: Values) -> bool:
    assert state.wait is not None
    assert state.loss_probability is not None
    return state.loss_probability <= params["loss"] and (
        state.wait.tail(params["T"]) <= params["tail"]
    )


def varying_case(case: Case) -> Values:
    p, id_ = case["params"], case["id"]
    period = round(2 * math.pi / p["w"])
    phase = Fraction(p.get("phi", 0.0)).limit_denominator(10**15)
    wave = f"sin(level={p['B']}/s,amplitude={p['A']}/s,period={period}s,phase={phase})"
    if id_ == "TV-07":
        model = Model.parse(f"{wave}/M({p['mu']}/s)/{p['n']}/{p['q']}")
        state = analyse(model)
        assert state.loss_probability is not None
        assert state.probability_of_waiting is not None
        refused = state.loss_probability
        return {
            "loss": refused,
            "L_mean": state.mean_in_system or 0.0,
            "loss_peak": max(course(model, 4096).loss_probability),
            "P_delay_or_loss": refused + (1 - refused) * state.probability_of_waiting,
        }
    points = 40_000
    day = course(Model.parse(f"{wave}/M({p['mu']}/s)/inf"), points)
    peak = max(range(points), key=lambda i: day.mean_in_system[i])
    top = max(range(points), key=lambda i: day.arrival_rate[i])
    return {
        "m(0)": day.mean_in_system[0],
        "m(P/4)": day.mean_in_system[points // 4],
        "m_max": day.mean_in_system[peak],
        "lag": (day.times[peak] - day.times[top]) % period,
        "arrivals_per_period": sum(day.arrival_rate) * period / points,
    }


SOLVERS: dict[str, Callable[[Case], Values]] = {
    "ErlangB": erlang_b_case,
    "ErlangC": erlang_c_case,
    "M/M/1": mm_case,
    "M/M/c": mm_case,
    "M/M/c/K": mm_case,
    "M/G/1": mg1_case,
    "M/D/1": md_case,
    "M/D/c": md_case,
    "M/G/1/K": mg1k_case,
    "GI/M/1": gm_case,
    "GI/M/c": gm_case,
    "D/D": dd_case,
    "disciplines": discipline_case,
    "approximations": approximation_case,
    "time-varying": varying_case,
    "batch": batch_case,
    "planner": planner_case,
}

# Steps of the course, beside which the instant of a peak is not known better.
COARSE = {"lag": 3e-4, "loss_peak": 1e-6}

EXACT = [c for c in CASES if c["group"] in SOLVERS and c["id"] != "MG1-01"]
APPROXIMATE = {
    "PHC-01": "E2(0.8/s)/E2(1s)/1/inf",
    "PHC-03": "E2(3.2/s)/E2(1s)/4/inf",
    "PHC-05": "E4(2.7/s)/E2(1s)/3/inf",
    "PHC-07": "M(1.8/s)/E2(1s)/2/inf",
    "PHC-09": "M(9/s)/H2(mean=1s,scv=2.25)/10/inf",
    "PHC-11": "E2(4.5/s)/H2(mean=1s,scv=2)/5/inf",
    "PHCK-01": "E2(2.2/s)/E2(1s)/2/5",
    "PHCK-03": "H2(mean=3.6/s,scv=4)/M(1s)/4/10",
    "PHCK-05": "H2(mean=3/s,scv=4)/E2(1s)/3",
    "GGNQ-01": "E2(2.2/s)/LN(mean=1s,scv=1.5)/2/5",
}


@pytest.mark.parametrize("case", EXACT, ids=lambda case: str(case["id"]))
def test_a_reference_value_is_reached(case: Case) -> None:
    found = SOLVERS[case["group"]](case)

    for name, value in case["values"].items():
        tolerance = COARSE.get(name, case["rel_tol"])
        assert found[name] == pytest.approx(value, rel=tolerance, abs=1e-12), name


def test_a_service_of_two_times_is_one_of_a_trace(tmp_path: Path) -> None:
    [case] = [case for case in CASES if case["id"] == "MG1-01"]
    path = tmp_path / "times.txt"
    path.write_text("9\n9\n12\n")

    state = analyse(f"M(5/h)/trace({path},unit=min)/1/inf")

    assert state.mean_in_system == pytest.approx(case["values"]["L"], rel=1e-9)
    assert state.mean_time_in_system == pytest.approx(60 * case["values"]["W_min"], rel=1e-9)
    assert state.mean_wait == pytest.approx(3600 * case["values"]["Wq"], rel=1e-9)


@pytest.mark.parametrize("id_", APPROXIMATE)
def test_an_approximation_is_within_the_error_that_it_states(id_: str) -> None:
    [case] = [case for case in CASES if case["id"] == id_]
    state = analyse(APPROXIMATE[id_])
    bounded = "loss" in case["values"]

    assert state.road == "approximation"
    assert state.error is not None
    if "Wq" in case["values"]:
        wait = 0.41 if bounded else 0.30
        assert state.mean_wait == pytest.approx(case["values"]["Wq"], rel=wait)
    if "Pw" in case["values"]:
        assert state.probability_of_waiting == pytest.approx(case["values"]["Pw"], rel=0.22)
    if bounded:
        assert state.loss_probability == pytest.approx(case["values"]["loss"], rel=0.55)


# Loss, mean wait and probability of waiting by a sparse Markov chain over the phases of gaps and
# services, an unbounded line cut where nothing is left of it: those that are approximated worst,
# and some others.
BY_CHAIN = [
    ("E2(0.357142857s)/E4(1s)/4/inf", 0, 0.1062863001, 0.2957198334),
    ("H2(mean=0.714285714s,scv=2.25)/M(1s)/2/20", 0.001614779163, 1.563194053, 0.6844188888),
    ("E4(0.357142857s)/E4(1s)/4/5", 0.000119422917, 0.05346747333, 0.2063248348),
    ("E2(0.714285714s)/H2(mean=1s,scv=4)/2/1", 0.1498561702, 0.1552300045, 0.2238063163),
    ("H2(mean=0.3125s,scv=4)/E3(1s)/4/1", 0.2636241492, 0.07571363858, 0.3322210286),
    ("E3(0.357142857s)/H2(mean=1s,scv=4)/4/inf", 0, 0.5820051026, 0.3529290022),
    ("H2(mean=1.428571429s,scv=4)/E4(1s)/1/0", 0.5135375641, 0, 0),
    ("E3(0.303030303s)/E2(1s)/3/2", 0.174559502, 0.2906751882, 0.6604228047),
    (
        "H2(mean=0.357142857s,scv=2)/H2(mean=1s,scv=2.25)/4/20",
        0.003707480054,
        0.707880483,
        0.5174734879,
    ),
    ("M(0.833333333s)/H2(mean=1s,scv=2.25)/1/5", 0.2625134298, 2.994503512, 0.8440431053),
    ("E2(0.227272727s)/H2(mean=1s,scv=2.25)/4/1", 0.251835504, 0.09222020462, 0.3399407577),
    ("H2(mean=1.111111111s,scv=4)/M(1s)/1/1", 0.4118867953, 0.5399546257, 0.5399546257),
    ("H2(mean=0.277777778s,scv=4)/E4(1s)/4/inf", 0, 4.471627114, 0.9078726232),
    ("M(0.555555556s)/H2(mean=1s,scv=2)/2/inf", 0, 6.345323687, 0.854676258),
    ("H2(mean=1.428571429s,scv=4)/H2(mean=1s,scv=2)/1/inf", 0, 6.915512497, 0.8330969495),
    ("E4(0.277777778s)/M(1s)/4/inf", 0, 1.132521929, 0.7097058755),
    ("H2(mean=1.25s,scv=2.25)/H2(mean=1s,scv=2)/1/inf", 0, 8.536929952, 0.8579022817),
]


@pytest.mark.parametrize(("spec", "loss", "mean_wait", "waiting"), BY_CHAIN)
def test_the_worst_approximation_is_within_the_error_that_it_states(
    spec: str, loss: float, mean_wait: float, waiting: float
) -> None:
    state = analyse(spec, method="two-moments")
    assert state.error is not None

    if state.model.waiting is None:
        assert "30 % in all of 108 exact models" in state.error
        assert state.mean_wait == pytest.approx(mean_wait, rel=0.30)
        assert "probability of waiting within 1, 10 and 22 %" in state.error
        assert state.probability_of_waiting == pytest.approx(waiting, rel=0.22)
    else:
        assert "loss, from 0.1 % on, within 4 % in half" in state.error
        assert "55 % in all of 180 exact models" in state.error
        if loss >= 0.001:
            assert state.loss_probability == pytest.approx(loss, rel=0.55)
        assert "mean wait within 2, 10 and 41 %, probability of waiting within 3, 16 and 41 %" in (
            state.error
        )
        assert state.mean_wait == pytest.approx(mean_wait, rel=0.41, abs=1e-12)
        assert state.probability_of_waiting == pytest.approx(waiting, rel=0.41, abs=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "D(1.8/s)/M(1s)/2/inf",
        "D(0.8/s)/M(1s)/1/inf",
        "E4(3.2/s)/M(1s)/4/inf",
        "U(0s,2.2s)/M(1s)/1/inf",
        "H2(mean=18/s,scv=2.25)/M(1s)/20/inf",
        "H2(mean=1.6/s,scv=4)/M(1s)/2/inf",
        "M(4.5/s)/D(1s)/5/inf",
        "M(9/s)/D(1s)/10/inf",
        "M(0.8/s)/E2(1s)/1/inf",
        "M(0.7/s)/H2(mean=1s,scv=4)/1/inf",
    ],
)
def test_an_approximation_is_as_close_to_an_exact_method_as_it_states(spec: str) -> None:
    exact, near = analyse(spec), analyse(spec, method="two-moments")

    assert "percentiles from p90 on within 21 %" in (near.error or "")
    assert near.mean_wait == pytest.approx(exact.mean_wait, rel=0.14)
    assert near.probability_of_waiting == pytest.approx(exact.probability_of_waiting, rel=0.22)
    for share in (0.9, 0.99, 0.999):
        assert near.wait_percentile(share) == pytest.approx(exact.wait_percentile(share), rel=0.21)


def test_every_case_is_used() -> None:
    used = {case["id"] for case in EXACT} | set(APPROXIMATE) | {"MG1-01"}

    # Topologies have a file of their own, test_topology.py.
    assert {case["id"] for case in CASES if case["group"] != "topology"} == used
