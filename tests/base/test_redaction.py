"""No password is ever shown."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molva._base.redaction import redact

# Letters that no other part of these texts uses, so that finding one is finding a leak.
_SECRET = st.text(st.sampled_from("QXZ%@:!$&'()*+,;=~._-"), min_size=1).map(lambda t: f"Q{t}Z")


@given(_SECRET)
def test_no_part_of_a_password_is_shown(secret: str) -> None:
    for text in (
        f"redis://ann:{secret}@host:6379/0",
        f"cannot reach amqp://ann:{secret}@host/vhost?topic=t: refused",
        f"redis://:{secret}@host",
        f"from redis://a:{secret}@h to kafka://b:{secret}@h1:1,h2:2",
    ):
        shown = redact(text)
        assert not set("QXZ") & set(shown), shown
        assert "***" in shown


@given(st.text(min_size=1))
def test_a_quoted_password_of_any_letters_is_not_shown(secret: str) -> None:
    try:
        quoted = quote(f"<{secret}>", safe="")
    except UnicodeEncodeError:
        return
    assert redact(f"x redis://ann:{quoted}@host:1/0?a=b y") == "x redis://ann:***@host:1/0?a=b y"


@pytest.mark.parametrize("sign", ["/", "?", "#", "/?#"])
@pytest.mark.parametrize("start", ["pa", "", "12x"])
def test_a_password_that_should_have_been_quoted_is_not_shown(start: str, sign: str) -> None:
    shown = redact(f"redis://ann:{start}{sign}S3CRET@host:6379/0?topic=t")

    assert "S3CRET" not in shown


@pytest.mark.parametrize(
    "name", ["password", "passwd", "token", "secret", "api_key", "apikey", "sasl_password", "Token"]
)
def test_an_option_that_is_a_secret_is_not_shown(name: str) -> None:
    shown = redact(f"kafka://h?a=1&{name}=S3CRET&b=2#x")

    assert shown == f"kafka://h?a=1&{name}=***&b=2#x"


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///var/lib/q.db?topic=a@b",
        "redis://host:6379/0?topic=a@b",
        "kafka://h1:9092,h2:9092/x?topic=a@b:c",
        "memory://ann@host/x",
        "mail ann@example.org at 10:30",
        "no URL at all",
        "",
    ],
)
def test_what_holds_no_password_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
