"""The notation: what it means, how it is printed, and where it points when it is wrong."""

import contextlib
import math
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva.queueing import Model, ModelError, NotationError, ParameterError, TraceError
from molva.queueing.distributions import (
    Deterministic,
    Distribution,
    Erlang,
    Exponential,
    General,
    Hyperexponential,
    LogNormal,
    Uniform,
)
from molva.queueing.model import (
    DISCIPLINES,
    Bulk,
    Priority,
    RandomRate,
    Recorded,
    Renewal,
    Sinusoid,
)

positive = st.fractions(min_value=Fraction(1, 10**9), max_value=10**6) | st.builds(
    # Decimals that end, some of them late.
    lambda above, twos, fives: Fraction(above, 2**twos * 5**fives),
    st.integers(1, 10**9),
    st.integers(0, 30),
    st.integers(0, 12),
)
forms = st.sampled_from(["time", "rate"])
scvs = st.fractions(min_value=0, max_value=1000)
laws: st.SearchStrategy[Distribution] = st.one_of(
    st.builds(Exponential, positive, forms),
    st.builds(Deterministic, positive, forms),
    st.builds(Erlang, st.integers(1, 1000), positive, forms),
    st.builds(Hyperexponential, positive, scvs.map(lambda scv: 1 + scv)),
    st.builds(LogNormal, positive, scvs),
    st.builds(General, positive, scvs),
    st.builds(lambda low, width: Uniform(low, low + width), scvs, positive),
)
shares = st.fractions(min_value=0, max_value=1)
drawn = st.builds(lambda low, width: RandomRate(low, low + width), positive, positive)
sinusoids = st.builds(
    lambda level, share, period, phase: Sinusoid(level, level * share, period, phase),
    positive,
    shares,
    positive | drawn,
    st.fractions(min_value=-10, max_value=10),
) | st.builds(
    lambda high, low: Sinusoid(high, RandomRate(high * low / 2, high), high), positive, shares
)
models = st.builds(
    Model,
    st.builds(Renewal, laws, st.integers(1, 9)) | sinusoids,
    laws | st.builds(Bulk, st.integers(1, 999), positive, scvs),
    st.none() | st.integers(1, 10**6),
    st.none() | st.integers(0, 10**6),
    st.sampled_from(DISCIPLINES) | st.builds(Priority, st.lists(positive, min_size=2, max_size=5)),
    st.none() | laws,
)


@given(models)
def test_what_is_printed_is_read_back_as_the_same_model(model: Model) -> None:
    text = str(model)

    assert Model.parse(text) == model
    assert str(Model.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("M(8/s)/M(200ms)/2/inf", "M(8/s)/M(0.2s)/2/inf"),
        ("D(1ms)/D(0.5ms)/1", "D(1ms)/D(0.5ms)/1"),
        ("D(1ms)/D(0.5ms)/1/0", "D(1ms)/D(0.5ms)/1"),
        ("2*D(1ms)/D(0.5ms)/1/1", "2*D(1ms)/D(0.5ms)/1/1"),
        ("M(8/s)/E3(200ms)/2/10", "M(8/s)/E3(0.2s)/2/10"),
        (
            "H2(mean=125ms,scv=4)/LN(scv=1.5, mean=200ms)/4/inf",
            "H2(mean=125ms,scv=4)/LN(mean=0.2s,scv=1.5)/4/inf",
        ),
        ("U(0s,2s)/G(mean=1s,scv=2)/1/inf", "U(0s,2s)/G(mean=1s,scv=2)/1/inf"),
        (" m ( 1/3 /s ) / e2(7/3s)/inf ", "M(20/min)/E2(7/3s)/inf"),
        ("M(1/s)/bulk(16, 2ms + 0.1ms*k)/1/inf", "M(1/s)/bulk(16,2ms + 0.1ms*k)/1/inf"),
        ("M(1/s)/M(1s)/1/inf/lifo", "M(1/s)/M(1s)/1/inf/lifo"),
        ("M(1/s)/M(1s)/1/0/Priority(3, 7)", "M(1/s)/M(1s)/1/0/priority(0.3,0.7)"),
        ("M(1/s)/M(1s)/1/9/preemptive(1,2)", "M(1/s)/M(1s)/1/9/preemptive(1/3,2/3)"),
        ("M(1/s)/M(1s)/1/inf/patience(E2(2s))", "M(1/s)/M(1s)/1/inf/patience(E2(2s))"),
        ("M(1/s)/M(1s)/inf/0/lifo/patience(D(2s))", "M(1/s)/M(1s)/inf"),
        (
            "sin(level=100/s,amplitude=U(40/s,80/s),period=24h)/M(1s)/inf",
            "sin(level=100/s,amplitude=U(40/s,80/s),period=24h,phase=0)/M(1s)/inf",
        ),
    ],
)
def test_a_model_is_printed_in_one_way(text: str, printed: str) -> None:
    assert str(Model.parse(text)) == printed


def test_numbers_are_what_is_written_and_not_the_double_next_to_it() -> None:
    model = Model.parse("D(0.1ms)/D(7/3s)/1")

    assert model.service.mean == Fraction(7, 3)
    assert 1 / model.arrivals.rate == Fraction(1, 10_000)


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("M(8)/M(1s)/1", 2, "8 has no unit: write 8s or 8ms for a time, or 8/s for a rate"),
        ("M(8/s)/M(-1s)/1", 7, "must be above 0; it is -1s"),
        ("M(8/s)/D(0ms)/1", 7, "must be above 0; it is 0s"),
        ("M(0/s)/M(1s)/1", 2, "a rate must be above 0"),
        ("M(8/s)/M(1s)/0", 13, "servers is whole and at least 1, not 0"),
        ("M(8/s)/M(1s)/2.5", 13, "servers is whole and at least 1, not 2.5"),
        ("M(8/s)/M(1s)/1/-1", 15, "waiting places is whole and at least 0, not -1"),
        ("GI(8/s)/M(1s)/1", 0, "did you mean G?"),
        ("M(8/s)/Exp(1s)/1", 7, "did you mean M?"),
        ("M(8/s)/LNN(mean=1s,scv=2)/1", 7, "did you mean LN?"),
        ("H2(mean=1s,scv=0.5)/M(1s)/1", 0, "no H2 has scv 0.5"),
        ("LN(mean=1s,scv=-1)/M(1s)/1", 0, "at least 0; it is -1"),
        ("H2(mean=1s,svc=2)/M(1s)/1", 11, "did you mean 'scv'?"),
        ("H2(mean=1s)/M(1s)/1", 10, "also needs scv="),
        ("U(2s,1s)/M(1s)/1", 0, "from the smaller time to the larger"),
        ("M(1e999/s)/M(1s)/1", 0, "between 1e-60 s and 1e60 s"),
        ("M(1e-61s)/M(1s)/1", 0, "between 1e-60 s and 1e60 s"),
        ("LN(mean=1s,scv=1e99)/M(1s)/1", 0, "at most 1e60"),
        ("E20000(2s)/M(1s)/1", 0, "beyond, write D"),
        ("E0(2s)/M(1s)/1", 0, "at least 1 phase"),
        ("M(8/s)/M(1sec)/1", 10, "ends in one of"),
        ("M(8/s)", 6, "a model is A/B/n or A/B/n/q; found the end"),
        ("M/M/1", 1, "parameters of M are missing"),
        ("", 0, "a letter with its parameters"),
        ("M(1/0s)/M(1s)/1", 2, "divides by 0"),
        ("sin(level=1/s,amplitude=2/s,period=1h)/M(1s)/1", 0, "would fall below 0"),
        ("M(8/s)/sin(level=1/s,amplitude=0/s,period=1h)/1", 7, "stands in the first place"),
        ("M(8/s)/M(1s)/1/inf/lfo", 19, "did you mean 'lifo'?"),
        ("M(8/s)/M(1s)/1/inf/priorty(1,2)", 19, "did you mean 'priority'?"),
        ("M(8/s)/M(1s)/1/inf/priority(1)", 19, "need 2 to 64 classes; 1 are given"),
        ("M(8/s)/M(1s)/1/inf/priority(1,0)", 19, "the share of a class is above 0"),
        ("M(8/s)/M(1s)/1/inf/lifo/random", 24, "all that may follow a discipline"),
        ("M(8/s)/M(1s)/1/inf/patience(2s)", 28, "a letter with its parameters"),
        ("M(8/s)/M(1s)/1/9/preemptive(1,2)/patience(M(2s))", 0, "not interrupted"),
        ("M(8/s)/bulk(2, 1s)/1/9/preemptive(1,2)", 0, "a bulk is not interrupted"),
        ("M(8/s)/M(1s)/1/inf rest", 19, "nothing more is expected"),
        ("M(8/s)/bulk(16, 2ms + 1/s*k)/1", 22, "not a rate"),
    ],
)
def test_an_error_is_one_sentence_that_points(text: str, position: int, words: str) -> None:
    with pytest.raises(NotationError, match="character") as caught:
        Model.parse(text)

    assert caught.value.position == position
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="MDEHLNUG2sin()/*,.=+-k0128 atrcebul", max_size=30))
def test_any_text_is_a_model_or_a_model_error(text: str) -> None:
    with contextlib.suppress(ModelError):
        Model.parse(text)


@pytest.mark.parametrize(("servers", "waiting"), [(0, 0), (2.5, 0), (1, -1), (1, 0.5)])
def test_counts_are_whole_in_python_too(servers: float, waiting: float) -> None:
    law = Exponential(Fraction(1))

    with pytest.raises(ParameterError, match=r"not|given"):
        Model(Renewal(law), law, servers, waiting)  # type: ignore[arg-type]


class TestKendall:
    def test_the_fourth_letter_counts_everybody(self) -> None:
        model = Model.from_kendall("M(8/s)/M(200ms)/2/10")

        assert (model.servers, model.waiting) == (2, 8)

    def test_without_a_fourth_letter_all_can_wait(self) -> None:
        assert Model.from_kendall("M(8/s)/M(200ms)/2").waiting is None

    def test_letters_stand_for_what_is_passed(self) -> None:
        model = Model.from_kendall(
            "M/G/c/K", arrivals="8/s", service="mean=1s,scv=2", servers=3, capacity=3
        )

        assert str(model) == "M(8/s)/G(mean=1s,scv=2)/3"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("M(8/s)/M(1s)/3/2", "at least the 3 in service"),
            ("M/M/1", "pass arrivals='8/s'"),
            ("M(8/s)/M(1s)/c", "servers=2"),
            ("M(8/s)/M(1s)", "A/B/c or A/B/c/K"),
        ],
    )
    def test_what_is_missing_is_named(self, text: str, words: str) -> None:
        with pytest.raises(ModelError, match=words):
            Model.from_kendall(text)


class TestTraces:
    def write(self, tmp_path: Path, text: str) -> str:
        path = tmp_path / "trace.txt"
        path.write_text(text)
        return str(path)

    def test_instants_become_gaps(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "# ms\n0\n10\n\n40\n")

        model = Model.parse(f"trace({path},unit=ms)/M(1s)/1/inf")

        assert isinstance(model.arrivals, Recorded)
        assert model.arrival_rate == pytest.approx(50.0)
        assert model.arrivals.gap.moment(2) == pytest.approx((0.01**2 + 0.03**2) / 2)
        assert Model.parse(str(model)) == model

    def test_service_times_need_no_order(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "3\n1\n2\n")

        service = Model.parse(f'M(1/s)/trace("{path}")/1').service

        assert service.mean == 2

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "is empty"),
            ("# only a comment\n", "is empty"),
            ("1\n3\n2\n", "is unsorted: instant 3, 2 s"),
            ("5\n5\n5\n", "is constant"),
            ("1\ntwo\n", "line 2: 'two' is no number"),
            ("1\nnan\n", "line 2: 'nan' is no number"),
        ],
    )
    def test_a_file_of_no_use_is_refused(self, text: str, words: str, tmp_path: Path) -> None:
        path = self.write(tmp_path, text)

        with pytest.raises(TraceError, match=words):
            Model.parse(f"trace({path})/M(1s)/1")

    def test_a_file_that_is_missing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TraceError, match="cannot be read"):
            Model.parse(f"trace({tmp_path}/none)/M(1s)/1")


@pytest.mark.parametrize(
    "law",
    [
        Exponential(Fraction(2)),
        Deterministic(Fraction(2)),
        Erlang(3, Fraction(2)),
        Hyperexponential(Fraction(2), Fraction(4)),
        Hyperexponential(Fraction(2), Fraction(100)),
        LogNormal(Fraction(2), Fraction(3, 2)),
        Uniform(Fraction(1), Fraction(3)),
    ],
    ids=str,
)
class TestDistributions:
    def test_its_moments_agree_with_its_mean_and_scv(self, law: Distribution) -> None:
        first, second = law.moment(1), law.moment(2)
        assert first is not None
        assert second is not None

        assert first == pytest.approx(float(law.mean), rel=1e-12)
        assert second / first**2 - 1 == pytest.approx(float(law.scv), rel=1e-12, abs=1e-12)

    def test_its_transform_has_its_moments(self, law: Distribution) -> None:
        first, second, h = law.moment(1), law.moment(2), 1e-5
        at = [law.lst(s) for s in (0.0, h)]
        assert first is not None
        assert second is not None
        assert None not in at

        expected = 1 - h * first + h * h * second / 2
        assert abs(at[0] - 1) < 1e-12  # type: ignore[operator]
        assert abs(at[1] - expected) < 1e-10  # type: ignore[operator]

    def test_its_samples_follow_its_distribution_function(self, law: Distribution) -> None:
        samples = law.sample(numpy.random.default_rng(7), 40_000)

        for t in (0.5, 1.5, 2.0, 2.5, 6.0):
            p = law.cdf(t)
            assert p is not None
            sigma = math.sqrt(p * (1 - p) / len(samples))
            assert abs((samples <= t).mean() - p) <= 5 * sigma + 1e-12
