"""URLs: what they name, what they refuse, and that no password is ever shown."""

import traceback
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva._base.url import positive_integer, positive_number
from molva.messaging import InvalidURLError, open_topic, with_options
from molva.messaging.url import BrokerURL, load_driver

# Never a part of anything else that a test writes.
_SECRET = "S3CRETx9"


def test_a_url_is_taken_apart() -> None:
    url = BrokerURL.parse(
        "kafka://ann:p%40ss@a:9092,b:9093/v%20h?topic=a%20b&subscription=s&create=never&lanes=4"
    )

    assert (url.scheme, url.host, url.path) == ("kafka", "a:9092,b:9093", "/v h")
    assert (url.topic, url.subscription, url.create) == ("a b", "s", "never")
    assert (url.user, url.password) == ("ann", "p@ss")
    assert url.options == {"lanes": "4"}


def test_a_base_url_names_no_topic() -> None:
    url = BrokerURL.parse("memory://x")

    assert (url.topic, url.subscription, url.create) == (None, None, "auto")


@pytest.mark.parametrize("text", ["", "queue.db", "sqlite:/x", "//x", "?topic=t", "memory://x?t"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(InvalidURLError, match=r"is no (broker )?URL"):
        BrokerURL.parse(text)


@pytest.mark.parametrize(
    ("scheme", "hint"),
    [("sqlit", "did you mean 'sqlite'"), ("xyz", "memory://, nats://, redis://")],
)
async def test_an_unknown_scheme_suggests_the_nearest(scheme: str, hint: str) -> None:
    with pytest.raises(InvalidURLError, match=hint):
        await open_topic(f"{scheme}://x?topic=t")


@pytest.mark.parametrize(
    "text",
    [
        f"redis://ann:{_SECRET}@host:6379/0",
        f"redis://:{_SECRET}@host:6379/0",
        f"redis://ann:a@b:{_SECRET}@host/0",
        f"redis://host/0?password={_SECRET}",
        f"redis://host/0?Token={_SECRET}&topic=t",
        # Mistakes: what should have been percent-encoded was not.
        f"redis://ann:pa/{_SECRET}@host/0",
        f"redis://ann:pa?{_SECRET}@host/0",
        f"redis://ann:pa#{_SECRET}@host/0",
        f"redis://ann:[{_SECRET}@host/0",
    ],
)
async def test_a_password_is_never_shown(text: str) -> None:
    shown = []
    for attempt in (text, text.replace("redis", "sqlite")):
        try:
            url = BrokerURL.parse(with_options(attempt, topic="t", oops="1"))
        except InvalidURLError as error:
            shown += [str(error), *traceback.format_exception_only(error)]
        else:
            shown += [str(url), repr(url), f"{[url]}"]
        try:
            await open_topic(attempt)
        except InvalidURLError as error:
            shown += [str(error), repr(error)]

    assert _SECRET not in "".join(shown)


@given(st.text(min_size=1, max_size=20))
def test_a_quoted_password_arrives_unshown(password: str) -> None:
    try:
        text = f"redis://ann:{quote(password, safe='')}@host:1/0?topic=t"
    except UnicodeEncodeError:
        return
    url = BrokerURL.parse(text)

    assert url.password == password
    assert str(url) == "redis://ann:***@host:1/0?topic=t"


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.text(), max_size=4))
def test_options_come_back_as_they_were_given(options: dict[str, str]) -> None:
    for name in ("topic", "subscription", "create"):
        options.pop(name, None)
    try:
        url = with_options("memory://x", **options)
    except UnicodeEncodeError:
        return

    assert BrokerURL.parse(url.rstrip("?")).options == options


def test_a_file_is_its_absolute_path() -> None:
    assert BrokerURL.parse("sqlite:///var/a%20b.db").file() == Path("/var/a b.db")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "", "9" * 30])
def test_what_is_no_positive_integer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        positive_integer(text)


@pytest.mark.parametrize("text", ["0", "-1", "x", "inf", "nan", ""])
def test_what_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="above 0"):
        positive_number(text)


def test_a_driver_is_a_module_of_its_scheme() -> None:
    assert load_driver(BrokerURL.parse("memory://x")).__name__.endswith("memory")
