"""The page in a real browser: Chromium, headless, driven through chromedriver."""

import asyncio
import collections
import json
import os
import shutil
import threading
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import uvicorn
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from starlette.types import Receive, Scope, Send

from molva._base.clock import SYSTEM_CLOCK, Clock
from molva.ratings.api import Api, build_api
from molva.ratings.campaign import Campaign
from molva.ratings.catalog import Catalog
from molva.ratings.ledger.protocol import (
    Difference,
    Ledger,
    LedgerCapabilities,
    LedgerEntry,
    LedgerSize,
    Outcome,
    Total,
)
from molva.ratings.rating import Submission
from tests.conftest import StartMolva, skip_without

pytestmark = [pytest.mark.chromium, pytest.mark.timeout(170)]

_CHROMIUM: Final = shutil.which("chromium") or shutil.which("google-chrome")
_CHROMEDRIVER: Final = shutil.which("chromedriver")

# Seconds that anything on the page may take to show.
_PATIENCE: Final = 30.0

_CAMPAIGNS: Final = {
    campaign.name: campaign
    for campaign in (
        Campaign(),
        Campaign(name="faces", question="How was the lecture?", minimum=1, maximum=5),
        Campaign(name="dense", question="How sure are you?", minimum=0, maximum=100, window=100),
    )
}


class Site:
    """The service, without what carries ratings: ``POST /rate`` counts them in memory."""

    def __init__(self) -> None:
        self.api: Final[Api] = build_api(self)
        self.ratings: Final[dict[str, dict[str, Any]]] = {}
        self.attempts: Final[list[str]] = []
        self.failures = 0
        self.refusal: str | None = None

    # As an application.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/rate":
            await self.api(scope, receive, send)
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status = self._rate(json.loads(body))
        answer = json.dumps({"detail": self.refusal} if status == 400 else {}).encode()
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    def _rate(self, rating: dict[str, Any]) -> int:
        self.attempts.append(rating["id"])
        if self.failures:
            self.failures -= 1
            return 503
        if self.refusal:
            return 400
        self.ratings.setdefault(rating["id"], rating)
        return 202

    # As the service that the API needs.

    @property
    def catalog(self) -> Catalog:
        return _MemoryCatalog()

    @property
    def ledger(self) -> Ledger:
        return _MemoryLedger(self.ratings)

    @property
    def clock(self) -> Clock:
        return SYSTEM_CLOCK

    async def pending(self) -> int | None:
        return 0

    async def ready(self) -> list[str]:
        return []

    async def metrics(self) -> bytes:
        return b""


class _MemoryCatalog:
    async def campaigns(self) -> list[Campaign]:
        return list(_CAMPAIGNS.values())

    async def campaign(self, name: str) -> Campaign | None:
        return _CAMPAIGNS.get(name)

    async def put_campaign(self, campaign: Campaign) -> bool:
        raise AssertionError("the page never asks for this")

    async def revision(self) -> int:
        return 1

    async def close(self) -> None:
        pass


class _MemoryLedger:
    capabilities: Final = LedgerCapabilities(
        frozenset(), history=False, window=None, horizon_seconds=None, ids="ledger"
    )

    def __init__(self, ratings: dict[str, dict[str, Any]]) -> None:
        self._ratings = ratings

    async def apply(
        self, batch: Sequence[Submission], *, applied_at_us: int
    ) -> list[Outcome | Exception]:
        raise AssertionError("the page never asks for this")

    async def total(
        self,
        campaign: str,
        *,
        item: str | None = None,
        n: int,
        as_of: int | None = None,
        trusted: bool = True,
    ) -> Total | None:
        rates = [
            rating["rate"]
            for rating in self._ratings.values()
            if rating.get("campaign", "default") == campaign
            and (item is None or rating.get("item") == item)
        ]
        if not rates:
            return None
        last = rates[-n:]
        spread = collections.Counter(rates)
        return Total(sum(last), len(last), len(rates), spread, len(self._ratings))

    async def last_seq(self, campaign: str) -> int:
        return len(self._ratings)

    def entries(self, campaign: str, *, since_seq: int = 0) -> AsyncIterator[LedgerEntry]:
        raise AssertionError("the page never asks for this")

    async def size(self) -> LedgerSize:
        raise AssertionError("the page never asks for this")

    def verify(self) -> AsyncIterator[Difference]:
        raise AssertionError("the page never asks for this")

    async def rebuild(self) -> None:
        raise AssertionError("the page never asks for this")

    async def close(self) -> None:
        pass


class RunningSite:
    """A site that answers under ``url``, and the levers that tests pull."""

    def __init__(self) -> None:
        self.site = Site()
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the server in a thread: on a free port, later on the same one again."""
        config = uvicorn.Config(
            self.site, port=self._port, log_level="error", lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve()), daemon=True
        )
        self._thread.start()
        wait_until(lambda: self._server.started, "the server did not start")
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Stop the server, streams first, and wait for its end."""
        loop = self._server.servers[0].get_loop()
        loop.call_soon_threadsafe(self.site.api.shutdown)
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"

    def restart(self, while_down: Callable[[], None]) -> None:
        """Stop the server, do something, start a new one that knows the old ratings."""
        self.stop()
        while_down()
        ratings = self.site.ratings
        self.site = Site()
        self.site.ratings.update(ratings)
        self.start()

    def rate(self, rate: int, *, campaign: str = "default") -> None:
        """Give a rating as another client would."""
        body = json.dumps({"id": str(uuid.uuid4()), "rate": rate, "campaign": campaign})
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/rate", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 202


@pytest.fixture
def running() -> Iterator[RunningSite]:
    """The site in a server; the one place that knows how it is started."""
    running = RunningSite()
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def site_url(running: RunningSite) -> str:
    return running.url


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    if _CHROMIUM is None or _CHROMEDRIVER is None:
        skip_without("chromium", "needs chromium and chromedriver on the PATH")
    assert _CHROMIUM is not None
    assert _CHROMEDRIVER is not None
    options = ChromeOptions()
    options.binary_location = _CHROMIUM
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1280,800",
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A home of its own: a test run leaves nothing behind in anybody's.
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    browser = Chrome(options, ChromeService(_CHROMEDRIVER, env=environment))
    try:
        yield browser
    finally:
        browser.quit()


def wait_until(condition: Callable[[], object], complaint: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)


def text_of(browser: Chrome, id_: str) -> str:
    return browser.find_element(By.ID, id_).text


def wait_for_text(browser: Chrome, id_: str, wanted: str) -> None:
    wait_until(
        lambda: wanted in text_of(browser, id_),
        f"#{id_} says {text_of(browser, id_)!r}, not {wanted!r}",
    )


def open_page(browser: Chrome, url: str) -> None:
    browser.get(url)
    wait_for_text(browser, "live", "live")


def button(browser: Chrome, rate: int) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f'#scale [data-rate="{rate}"]')


def focused_rate(browser: Chrome) -> str | None:
    return browser.switch_to.active_element.get_attribute("data-rate")


def tab_to_scale(browser: Chrome) -> None:
    for _ in range(5):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if focused_rate(browser) is not None:
            return
    pytest.fail("Tab does not reach the scale")


def complaints(browser: Chrome) -> list[str]:
    """What the console holds of errors, CSP violations among them."""
    log = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in log if entry["level"] in ("WARNING", "SEVERE")]


def test_a_click_rates(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    button(browser, 7).click()
    wait_for_text(browser, "said", "Thanks, you gave 7.")
    wait_until(lambda: len(running.site.ratings) == 1, "nothing arrived")
    [rating] = running.site.ratings.values()
    assert (rating["rate"], rating["campaign"]) == (7, "default")
    assert uuid.UUID(rating["id"]).version == 4


def test_the_average_moves_with_the_ratings_given(browser: Chrome, site_url: str) -> None:
    open_page(browser, site_url)
    assert text_of(browser, "average") == "–"
    button(browser, 7).click()
    wait_for_text(browser, "average", "7.00")
    button(browser, 10).click()
    wait_for_text(browser, "average", "8.50")
    assert text_of(browser, "taken") == "average of all 2 ratings"


def test_another_clients_rating_shows_without_a_reload(
    browser: Chrome, running: RunningSite
) -> None:
    open_page(browser, running.url)
    for rate in (3, 4):
        running.rate(rate)
    wait_for_text(browser, "average", "3.50")
    wait_for_text(browser, "counted", "all 2 ratings")


def test_the_keyboard_alone_is_enough(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    tab_to_scale(browser)
    assert focused_rate(browser) == "0"
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert focused_rate(browser) == "2"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    wait_for_text(browser, "average", "2.00")
    browser.switch_to.active_element.send_keys(Keys.END)
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    wait_for_text(browser, "average", "6.00")


def test_digits_rate_while_the_scale_has_the_focus(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    # Between the two keys of 10 a busy browser takes longer than a visitor.
    browser.execute_script(
        "const real = window.setTimeout;"
        "window.setTimeout = (f, ms) => real(f, ms === 600 ? 4_000 : ms)"
    )
    tab_to_scale(browser)
    browser.switch_to.active_element.send_keys("8")
    wait_for_text(browser, "average", "8.00")
    browser.switch_to.active_element.send_keys("10")
    wait_for_text(browser, "average", "9.00")
    browser.switch_to.active_element.send_keys("1")
    wait_for_text(browser, "average", "6.33")


def test_digits_elsewhere_rate_nothing(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    browser.find_element(By.TAG_NAME, "body").send_keys("8")
    browser.find_element(By.LINK_TEXT, "API").send_keys("8")
    time.sleep(0.3)
    assert running.site.attempts == []


def test_a_503_is_tried_again_with_the_same_id(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    running.site.failures = 1
    button(browser, 9).click()
    wait_for_text(browser, "average", "9.00")
    first, second = running.site.attempts
    assert first == second
    wait_until(lambda: text_of(browser, "said") == "Thanks, you gave 9.", "the page is not content")


def test_after_many_failures_the_visitor_decides(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    # The pauses, and not the ten seconds that an answer has.
    browser.execute_script(
        "const real = window.setTimeout;"
        "window.setTimeout = (f, ms) => real(f, ms === 10_000 ? ms : ms / 50)"
    )
    running.site.failures = 7
    button(browser, 9).click()
    wait_for_text(browser, "said", "Your 9 could not be sent: the service answered 503.")
    browser.find_element(By.ID, "again").click()
    wait_for_text(browser, "average", "9.00")
    assert len(set(running.site.attempts)) == 1
    wait_until(lambda: not browser.find_element(By.ID, "again").is_displayed(), "the button stays")


def test_a_refusal_is_told_in_the_services_words(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    running.site.refusal = "<b>no</b> such scale"
    button(browser, 9).click()
    wait_for_text(browser, "said", "Your 9 was not accepted: <b>no</b> such scale")
    assert len(running.site.attempts) == 1


def test_an_id_is_made_where_the_context_is_not_secure(
    browser: Chrome, running: RunningSite
) -> None:
    script = "delete Crypto.prototype.randomUUID"
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    open_page(browser, running.url)
    button(browser, 4).click()
    wait_for_text(browser, "average", "4.00")
    [id_] = running.site.ratings
    assert uuid.UUID(id_).version == 4
    assert str(uuid.UUID(id_)) == id_


def test_a_double_click_is_one_rating(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)
    browser.execute_script(
        "for (const detail of [1, 2]) arguments[0].dispatchEvent("
        "new MouseEvent('click', {bubbles: true, detail}))",
        button(browser, 5),
    )
    wait_for_text(browser, "average", "5.00")
    assert len(running.site.attempts) == 1


def test_the_page_recovers_when_the_service_was_away(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, running.url)

    def rate_while_down() -> None:
        wait_for_text(browser, "live", "reconnecting…")
        button(browser, 6).click()
        wait_for_text(browser, "said", "Still sending…")

    running.restart(rate_while_down)
    wait_for_text(browser, "average", "6.00")
    assert text_of(browser, "live") == "live"
    wait_until(lambda: text_of(browser, "said") == "Thanks, you gave 6.", "the page is not content")
    assert len(running.site.ratings) == 1


def test_a_short_scale_is_faces_with_names(browser: Chrome, site_url: str) -> None:
    open_page(browser, f"{site_url}/?campaign=faces")
    assert text_of(browser, "question") == "How was the lecture?"
    labels = [
        element.accessible_name
        for element in browser.find_elements(By.CSS_SELECTOR, "#scale button")
    ]
    assert labels == [
        "Very bad, 1 of 5",
        "Bad, 2 of 5",
        "Okay, 3 of 5",
        "Good, 4 of 5",
        "Very good, 5 of 5",
    ]


def test_the_item_of_the_address_is_rated(browser: Chrome, running: RunningSite) -> None:
    open_page(browser, f"{running.url}/?item=lecture%203")
    running.rate(1)
    button(browser, 9).click()
    wait_for_text(browser, "average", "9.00")
    assert text_of(browser, "item") == "lecture 3"


def test_markup_in_the_address_stays_text(browser: Chrome, site_url: str) -> None:
    open_page(browser, f"{site_url}/?item=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E")
    assert text_of(browser, "item") == "<img src=x onerror=alert(1)>"
    assert complaints(browser) == []


def test_an_unknown_campaign_is_said_so(browser: Chrome, site_url: str) -> None:
    browser.get(f"{site_url}/?campaign=nobody")
    wait_for_text(browser, "question", "There is no such campaign")


def test_nothing_is_wider_than_a_small_phone(browser: Chrome, site_url: str) -> None:
    metrics = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    for campaign in _CAMPAIGNS:
        open_page(browser, f"{site_url}/?campaign={campaign}")
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width == 320, campaign


def test_the_console_stays_silent(browser: Chrome, site_url: str) -> None:
    for campaign in _CAMPAIGNS:
        open_page(browser, f"{site_url}/?campaign={campaign}")
        button(browser, 3).click()
        wait_for_text(browser, "average", "3.00")
    assert complaints(browser) == []


def test_the_page_works_on_the_real_service(browser: Chrome, start_molva: StartMolva) -> None:
    molva = start_molva()
    open_page(browser, molva.url)
    button(browser, 7).click()
    wait_for_text(browser, "average", "7.00")
    assert molva.request("POST", "/rate?rate=10")[0] == 202
    wait_for_text(browser, "average", "8.50")
    assert complaints(browser) == []
