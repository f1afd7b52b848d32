"""The notation A/B/n/q as text, read with the exact position of whatever is wrong.

    model     = arrivals "/" service "/" servers [ "/" waiting [ "/" discipline ] [ "/" patience ] ]
    arrivals  = [ count "*" ] law | "sin(" … ")" | "trace(" file ")"
    service   = law | "bulk(" limit "," time "+" time "*k" ")" | "trace(" file ")"
    law       = "M(" mean ")" | "D(" mean ")" | "E" phases "(" mean ")" | "U(" time "," time ")"
              | "H2(" moments ")" | "LN(" moments ")" | "G(" moments ")"
    moments   = "mean=" mean "," "scv=" number
    mean      = time | rate
    servers   = count | "inf"
    waiting   = count | "inf"
    discipline = "fifo" | "lifo" | "random" | ( "priority(" | "preemptive(" ) share "," … ")"
    patience  = "patience(" law ")"

Numbers are exact and have units, see ``quantities.py``. Spaces may stand between any two
parts. A letter may be small or capital.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Final, NoReturn, TypeVar

from molva.queueing.distributions import (
    Deterministic,
    Distribution,
    Erlang,
    Exponential,
    General,
    Hyperexponential,
    LogNormal,
    Trace,
    Uniform,
)
from molva.queueing.errors import NotationError, ParameterError
from molva.queueing.model import (
    DISCIPLINES,
    Bulk,
    Discipline,
    Model,
    Priority,
    RandomRate,
    Recorded,
    Renewal,
    Sinusoid,
)
from molva.queueing.quantities import NUMBER, UNITS, Form, exact, number_text

__all__ = ["parse", "parse_kendall", "parse_time"]

T = TypeVar("T")

_LETTERS: Final = ("M", "D", "E2", "H2", "LN", "U", "G", "sin", "trace", "bulk")

# What people write who come from elsewhere. difflib would not find these.
_SYNONYMS: Final = {
    "gi": "G",
    "exp": "M",
    "exponential": "M",
    "poisson": "M",
    "markov": "M",
    "det": "D",
    "const": "D",
    "deterministic": "D",
    "e": "E2",
    "ek": "E2",
    "erlang": "E2",
    "h": "H2",
    "hyper": "H2",
    "lognormal": "LN",
    "lognorm": "LN",
    "uniform": "U",
    "general": "G",
    "sine": "sin",
    "sinus": "sin",
    "cos": "sin",
    "file": "trace",
    "batch": "bulk",
}

_WORD: Final = re.compile(r"[A-Za-zµ]+\d*")
_UNIT: Final = re.compile(r"[A-Za-zµ]+")

# A count: without the ratio of NUMBER, because in 2/10 the slash separates n from q.
_DECIMAL: Final = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d{1,3})?")


def parse(text: str) -> Model:
    """Return the model that ``text`` describes; see ``Model.parse``."""
    return _Reader(text).model()


def parse_kendall(
    text: str,
    *,
    arrivals: str | None = None,
    service: str | None = None,
    servers: int | None = None,
    capacity: int | None = None,
) -> Model:
    """Return the model of A/B/c/K, where K counts everybody; see ``Model.from_kendall``."""
    fields = _split(text)
    if not 3 <= len(fields) <= 4:
        raise NotationError(text, len(text), "Kendall's notation here is A/B/c or A/B/c/K")
    filled = [
        _filled(text, fields[0], arrivals, "arrivals='8/s'"),
        _filled(text, fields[1], service, "service='200ms'"),
        _filled_count(text, fields[2], servers, "servers=2"),
    ]
    if len(fields) == 4:
        filled.append(_filled_count(text, fields[3], capacity, "capacity=10"))
    model = _Reader("/".join(filled)).model()
    if len(fields) == 3:
        return Model(model.arrivals, model.service, model.servers, None)
    if model.servers is None or model.waiting is None:
        return model
    if model.waiting < model.servers:
        raise ParameterError(
            f"K counts everybody in the system, so it is at least the {model.servers} in "
            f"service; it is {model.waiting}"
        )
    return Model(model.arrivals, model.service, model.servers, model.waiting - model.servers)


def parse_time(text: str) -> Fraction:
    """Return the seconds of one time with its unit, as ``250ms``.

    Raises:
        NotationError: It is none, or below 0.
    """
    reader = _Reader(text)
    seconds = reader.time("a time")
    reader.skip()
    if reader.at < len(text):
        reader.fail(f"nothing more is expected here, not {text[reader.at :]!r}")
    if seconds < 0:
        reader.fail("a time is at least 0", 0)
    return seconds


def _split(text: str) -> list[str]:
    """Cut at the slashes outside parentheses, which are not those of a rate."""
    fields, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "/" and depth == 0:
            fields.append("")
        else:
            fields[-1] += character
    return [field.strip() for field in fields]


def _filled(text: str, field: str, inside: str | None, example: str) -> str:
    if "(" in field:
        return field
    if inside is None:
        raise NotationError(text, text.find(field), f"{field!r} has no parameters; pass {example}")
    return f"{field}({inside})"


def _filled_count(text: str, field: str, count: int | None, example: str) -> str:
    if not field.isalpha() or field == "inf":
        return field
    if count is None:
        raise NotationError(text, text.rfind(field), f"{field!r} stands for no number; {example}")
    return str(count)


class _Reader:
    """Reads one text from left to right. ``at`` is the index of what comes next."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    # The model and its five fields.

    def model(self) -> Model:
        arrivals = self.arrivals()
        self.expect("/", "between arrivals and service; a model is A/B/n or A/B/n/q")
        service = self.service()
        self.expect("/", "and the number of servers; a model is A/B/n or A/B/n/q")
        servers = self.count("servers", least=1)
        waiting: int | None = 0
        discipline: Discipline | Priority | None = None
        patience: Distribution | None = None
        if self.accept("/"):
            waiting = self.count("waiting places", least=0)
            if self.accept("/"):
                discipline = self.discipline()
                if discipline is None or self.accept("/"):
                    patience = self.patience()
        self.skip()
        if self.at < len(self.text):
            self.fail(f"nothing more is expected here, not {self.text[self.at :]!r}")
        order = discipline or "fifo"
        return self.made(0, lambda: Model(arrivals, service, servers, waiting, order, patience))

    def arrivals(self) -> Renewal | Sinusoid | Recorded:
        self.skip()
        start = self.at
        batch = 1
        if self.peek().isdigit():
            batch = self.whole("jobs at an instant", least=1)
            self.expect("*", "after the number of jobs at an instant, as in 2*D(1ms)")
        word, at = self.letter()
        if word in ("sin", "trace") and batch != 1:
            self.fail(f"only a distribution of gaps can be multiplied, not {word}(…)", start)
        if word == "sin":
            return self.sinusoid(at)
        if word == "trace":
            trace = self.trace()
            return Recorded(trace, trace.gaps())
        if word == "bulk":
            self.fail("bulk(…) is a service and stands in the second place", at)
        law = self.law(word, at)
        return self.made(start, lambda: Renewal(law, batch))

    def service(self) -> Distribution | Bulk:
        word, at = self.letter()
        if word == "bulk":
            return self.bulk(at)
        if word == "trace":
            return self.trace().as_service()
        if word == "sin":
            self.fail("sin(…) is a flow of arrivals and stands in the first place", at)
        return self.law(word, at)

    def count(self, what: str, *, least: int) -> int | None:
        self.skip()
        if self.text[self.at : self.at + 3].lower() == "inf":
            self.at += 3
            return None
        return self.whole(what, least=least)

    def discipline(self) -> Discipline | Priority | None:
        """Read who is next; None, and nothing read, where ``patience(`` follows."""
        self.skip()
        at = self.at
        match = _WORD.match(self.text, at)
        word = match.group().lower() if match else ""
        if word == "patience":
            return None
        if word in ("priority", "preemptive"):
            self.at += len(word)
            self.expect("(", f"after {word}, as in {word}(3,7): shares of the arrivals")
            shares = [self.bare()]
            while self.accept(","):
                shares.append(self.bare())
            self.expect(")", f"after the shares of {word}")
            return self.made(at, lambda: Priority(tuple(shares), word == "preemptive"))
        if word not in DISCIPLINES:
            known = (*DISCIPLINES, "priority(…)", "preemptive(…)")
            near = _near(word, (*DISCIPLINES, "priority", "preemptive", "patience"))
            self.fail(f"a discipline is one of {', '.join(known)}{near}")
        self.at += len(word)
        return word

    def patience(self) -> Distribution:
        """Read ``patience(…)``, the last there is."""
        self.expect("patience", "is all that may follow a discipline: patience(M(2s))")
        self.expect("(", "after patience, as in patience(M(2s))")
        word, at = self.letter()
        if word in ("sin", "bulk"):
            self.fail(f"patience is a time with a distribution, not {word}(…)", at)
        law = self.trace().as_service() if word == "trace" else self.law(word, at)
        self.expect(")", "after the distribution of patience")
        return law

    # One law.

    def letter(self) -> tuple[str, int]:
        """Read the word before a parenthesis; return it as we spell it, and where it stood."""
        self.skip()
        at = self.at
        match = _WORD.match(self.text, at)
        if not match:
            self.fail("a letter with its parameters is expected, as M(8/s) or D(1ms)")
        word = match.group()
        spelled = self.spelled(word)
        if spelled is None:
            guess = _SYNONYMS.get(word.lower().rstrip("0123456789"))
            close = difflib.get_close_matches(word, _LETTERS, n=1, cutoff=0.5)
            nearest = guess or (close[0] if close else None)
            known = "M, D, E2 (any phases), H2, LN, U, G, sin, trace, bulk"
            hint = f"; did you mean {nearest}?" if nearest else ""
            self.fail(f"unknown letter {word!r}, known are {known}{hint}")
        self.at = match.end()
        if not self.accept("("):
            self.fail(f"the parameters of {spelled} are missing: write {_example(spelled)}")
        return spelled, at

    @staticmethod
    def spelled(word: str) -> str | None:
        if re.fullmatch(r"[Ee]\d+", word):
            return word.upper()
        return next((each for each in _LETTERS if each.lower() == word.lower()), None)

    def law(self, word: str, at: int) -> Distribution:
        if word in ("M", "D") or word[0] == "E":
            mean, form = self.mean()
            self.expect(")", f"after the mean of {word}")
            if word == "M":
                return self.made(at, lambda: Exponential(mean, form))
            if word == "D":
                return self.made(at, lambda: Deterministic(mean, form))
            return self.made(at, lambda: Erlang(int(word[1:]), mean, form))
        if word == "U":
            low = self.time("a time")
            self.expect(",", "between the two times of U")
            high = self.time("a time")
            self.expect(")", "after the second time of U")
            return self.made(at, lambda: Uniform(low, high))
        values = self.named({"mean": lambda: self.mean()[0], "scv": self.bare}, word)
        mean, scv = values["mean"], values["scv"]
        if word == "H2":
            return self.made(at, lambda: Hyperexponential(mean, scv))
        if word == "LN":
            return self.made(at, lambda: LogNormal(mean, scv))
        return self.made(at, lambda: General(mean, scv))

    def sinusoid(self, at: int) -> Sinusoid:
        readers: dict[str, Callable[[], Fraction | RandomRate]] = {
            "level": lambda: self.rate("a level"),
            "amplitude": lambda: self.number_or_drawn(lambda: self.rate("an amplitude")),
            "period": lambda: self.number_or_drawn(lambda: self.time("a period")),
            "phase": self.bare,
        }
        defaults: dict[str, Fraction | RandomRate] = {"phase": Fraction(0)}
        values = self.named(readers, "sin", optional=defaults)
        level, phase = values["level"], values["phase"]
        assert isinstance(level, Fraction)
        assert isinstance(phase, Fraction)
        return self.made(at, lambda: Sinusoid(level, values["amplitude"], values["period"], phase))

    def number_or_drawn(self, one: Callable[[], Fraction]) -> Fraction | RandomRate:
        self.skip()
        at = self.at
        if self.text[at : at + 1] not in ("U", "u"):
            return one()
        self.at += 1
        self.expect("(", "after U")
        low = one()
        self.expect(",", "between the two numbers of U")
        high = one()
        self.expect(")", "after the second number of U")
        return self.made(at, lambda: RandomRate(low, high))

    def bulk(self, at: int) -> Bulk:
        limit = self.whole("jobs in one bulk", least=1)
        self.expect(",", "between the limit of a bulk and its time")
        base = per_job = Fraction(0)
        while True:
            time = self.time("a time")
            if self.accept("*"):
                self.expect("k", "after *: the jobs in the bulk, as in 2ms + 0.1ms*k")
                per_job += time
            else:
                base += time
            if not self.accept("+"):
                break
        self.expect(")", "after the time of a bulk, as in bulk(16, 2ms + 0.1ms*k)")
        return self.made(at, lambda: Bulk(limit, base, per_job))

    def trace(self) -> Trace:
        self.skip()
        match = re.compile(r'"([^"]*)"|([^,)"]+)').match(self.text, self.at)
        if not match:
            self.fail("trace(FILE) needs the name of a file")
        path = match.group(1) if match.group(1) is not None else match.group(2).strip()
        self.at = match.end()
        unit = "s"
        if self.accept(","):
            self.expect("unit", "is all that may follow the file: trace(FILE, unit=ms)")
            self.expect("=", "after unit")
            unit = self.unit("a unit")
        self.expect(")", "after the file of a trace")
        return Trace.read(path, unit)

    def named(
        self,
        readers: dict[str, Callable[[], T]],
        word: str,
        optional: dict[str, T] | None = None,
    ) -> dict[str, T]:
        """Read ``name=value`` pairs in any order, up to and with the closing parenthesis."""
        values: dict[str, T] = {}
        while True:
            self.skip()
            match = re.compile(r"[A-Za-z_]+").match(self.text, self.at)
            name = match.group() if match else ""
            if name not in readers:
                wanted = ", ".join(f"{each}=…" for each in readers)
                hint = _near(name, readers)
                self.fail(f"{word} takes {wanted}, not {name or self.peek()!r}{hint}")
            if name in values:
                self.fail(f"{name} stands twice")
            self.at += len(name)
            self.expect("=", f"after {name}")
            values[name] = readers[name]()
            if not self.accept(","):
                break
        missing = [each for each in readers if each not in values and each not in (optional or {})]
        if missing:
            self.fail(f"{word} also needs {' and '.join(f'{each}=…' for each in missing)}")
        self.expect(")", f"after the parameters of {word}")
        return {**(optional or {}), **values}

    # Numbers and their units.

    def mean(self) -> tuple[Fraction, Form]:
        """Read a time, or a rate whose inverse it is."""
        number, at = self.number("a time or a rate")
        if self.accept("/"):
            per_second = number / UNITS[self.unit("a rate")]
            if per_second <= 0:
                self.fail(f"a rate must be above 0; it is {number_text(per_second)}/s", at)
            return 1 / per_second, "rate"
        self.require_unit(number, at, rate_too=True)
        seconds = number * UNITS[self.unit("a time")]
        return seconds, "time"

    def time(self, what: str) -> Fraction:
        number, at = self.number(what)
        if self.peek() == "/":
            self.fail(f"{what} is expected here, as 200ms, not a rate", at)
        self.require_unit(number, at, rate_too=False)
        return number * UNITS[self.unit(what)]

    def rate(self, what: str) -> Fraction:
        number, at = self.number(what)
        if not self.accept("/"):
            shown = number_text(number)
            self.fail(f"{what} is a rate: write {shown}/s, {shown}/min or {shown}/h", at)
        return number / UNITS[self.unit("a rate")]

    def bare(self) -> Fraction:
        number, _ = self.number("a number")
        if _UNIT.match(self.text, self.at):
            self.fail("a plain number is expected here, without a unit")
        return number

    def number(self, what: str, pattern: re.Pattern[str] = NUMBER) -> tuple[Fraction, int]:
        self.skip()
        at = self.at
        match = pattern.match(self.text, at)
        if not match:
            self.fail(f"{what} is expected here, not {self.text[at : at + 12]!r}")
        self.at = match.end()
        try:
            number = exact(match.group())
        except ZeroDivisionError:
            self.fail(f"{match.group()} divides by 0", at)
        return number, at

    def require_unit(self, number: Fraction, at: int, *, rate_too: bool) -> None:
        self.skip()
        if not _UNIT.match(self.text, self.at):
            shown = number_text(number)
            rate = f", or {shown}/s for a rate" if rate_too else ""
            self.fail(f"{shown} has no unit: write {shown}s or {shown}ms for a time{rate}", at)

    def unit(self, what: str) -> str:
        self.skip()
        match = _UNIT.match(self.text, self.at)
        unit = match.group() if match else ""
        if unit not in UNITS:
            near = _near(unit, UNITS)
            known = ", ".join(each for each in UNITS if each != "µs")
            self.fail(f"{what} ends in one of {known}, not {unit or self.peek()!r}{near}")
        self.at += len(unit)
        return unit

    def whole(self, what: str, *, least: int) -> int:
        number, at = self.number(f"a whole number of {what}", _DECIMAL)
        if number.denominator != 1 or number < least:
            self.fail(
                f"the number of {what} is whole and at least {least}, not {number_text(number)}", at
            )
        if _UNIT.match(self.text, self.at):
            self.fail(f"a number of {what} has no unit")
        return int(number)

    # The text itself.

    def skip(self) -> None:
        while self.peek().isspace():
            self.at += 1

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def accept(self, token: str) -> bool:
        self.skip()
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def expect(self, token: str, why: str) -> None:
        if not self.accept(token):
            found = repr(self.text[self.at :][:12]) if self.peek() else "the end"
            self.fail(f"expected {token!r} {why}; found {found}")

    def made(self, at: int, make: Callable[[], T]) -> T:
        """Return what ``make`` makes; an impossible number is an error at ``at``."""
        try:
            return make()
        except ParameterError as error:
            raise NotationError(self.text, at, str(error)) from error

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise NotationError(self.text, self.at if at is None else at, problem)


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _example(letter: str) -> str:
    examples = {
        "U": "U(0s,2s)",
        "sin": "sin(level=100/s,amplitude=60/s,period=24h)",
        "trace": "trace(FILE)",
        "bulk": "bulk(16, 2ms + 0.1ms*k)",
    }
    moments = f"{letter}(mean=1s,scv=2)"
    plain = f"{letter}(8/s) or {letter}(125ms)"
    return examples.get(letter, moments if letter in ("H2", "LN", "G") else plain)
