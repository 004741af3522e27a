"""Show the dashboard made-up figures in a real browser, and look at what it makes of them."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator

import pytest
from e2e.browser import CHROMIUM, Browser
from e2e.dashboard_page import FAINT_TEXTS, OVERFLOW, Dashboard, open_dashboard
from harness.fake_admin import START_S, TOKEN, FakeAdmin, Json, Scene, connected
from ws2api.supervisor import dashboard

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>&lt;"
)
UNREACHABLE = "ERR_"  # how Chromium logs that nobody listens, or that a stream was cut


class Steady(Scene):
    """Two seconds a step, and the same in each."""

    def step(self) -> None:
        self.status["time_s"] += 2
        self.status["uptime_s"] += 2
        for worker in self.status["workers"]:
            worker["messages_received"] += 20 * (worker["worker"] + 1)
        self.status["totals"]["connections_opened"] += 3
        self.status["totals"]["messages_received"] += 60
        self.status["totals"]["bytes_received"] += 4000
        self.status["api_latency"]["counts"]["message"][3] += 50  # 5 to 10 ms
        self.status["errors"]["timeout"] += 1


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all the tests."""
    with Browser() as running:
        yield running


@pytest.fixture
def fake() -> Iterator[FakeAdmin]:
    """Serve four workers."""
    with FakeAdmin(Scene(4, clients=4000)) as fake:
        yield fake


@pytest.fixture
def page(browser: Browser, fake: FakeAdmin) -> Iterator[Dashboard]:
    """Open the page without a token, and wait for figures."""
    with open_dashboard(browser, fake.url) as page:
        page.expect_live()
        yield page


@pytest.fixture
def admin(page: Dashboard) -> Dashboard:
    """Open the page with the token."""
    page.become_admin(TOKEN)
    return page


# What is served


def test_policy_has_the_hash_of_each_inline_element() -> None:
    page, policy = dashboard.load()
    for name in (b"style", b"script"):
        (content,) = re.findall(rb"<%s>(.*?)</%s>" % (name, name), page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"{name.decode()}-src 'sha256-{digest}'" in policy


def test_policy_allows_nothing_else() -> None:
    _, policy = dashboard.load()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["img-src"] == "data:"
    for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert rules[name] == "'none'"
    assert "unsafe" not in policy


def test_page_refers_to_nothing_outside() -> None:
    page = dashboard.load()[0].decode()
    assert set(re.findall(r"\bhttps?://[^'\"\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page)
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<[^>]+\s(style|on\w+)=", markup)


# Figures


@needs_chromium
def test_figures_move(page: Dashboard) -> None:
    assert page.text_of("#verdict").startswith("Ready. 4 workers serve.")
    assert page.number("#connections") > 3000
    page.wait_for_change("#messages")
    page.wait_for_change("#connections-note")
    assert page.worker(2)["State"] == "serving"
    assert page.worker(2)["PID"] == "4102"


@needs_chromium
def test_draws_what_comes(page: Dashboard) -> None:
    for plot in ("#connections-plot", "#messages-plot", ".tile canvas"):
        drawing = f"document.querySelector('{plot}').toDataURL()"
        before = page.page.evaluate(drawing)
        page.page.wait_for(f"{drawing} != '{before}'")


@needs_chromium
def test_rates_are_differences_over_the_time_of_the_gateway(browser: Browser) -> None:
    with FakeAdmin(Steady(2)) as fake, open_dashboard(browser, fake.url) as page:
        page.expect("#messages", "30")
        tiles = page.texts_of(".tile", "h2, .figure")
        assert ["messages in/s", "30"] in tiles
        assert ["connects/s", "1.5"] in tiles
        assert ["payload/s", "2.0 KB"] in tiles
        assert [page.worker(number)["Messages/s"] for number in (0, 1)] == ["10", "20"]
        latency = page.texts_of("#latency tbody tr", "th, td")
        assert latency[1] == ["API: message", "25", "7.5", "9.5", "10"]
        assert latency[0] == ["API: connect", "0", "–", "–", "–"]
        page.page.wait_for("samples.length > 35")  # more than a minute
        errors = page.page.evaluate(
            "[...document.querySelectorAll('#errors tbody tr')][0].innerText"
        )
        assert errors.split()[:2] == ["timeout", "30"]


@needs_chromium
def test_quantile(page: Dashboard) -> None:
    for counts, q, expected in (
        ([0, 0, 0], 0.5, "NaN"),
        ([10, 0, 0], 0.5, "0.5"),
        ([10, 10, 0], 0.5, "1"),
        ([10, 10, 0], 0.75, "1.5"),
        ([0, 4, 0], 0.25, "1.25"),
        ([1, 0, 99], 0.5, "Infinity"),
    ):
        assert page.page.evaluate(f"String(quantile([1, 2], {counts}, {q}))") == expected


@needs_chromium
def test_marks_a_worker_with_too_many_connections(page: Dashboard, fake: FakeAdmin) -> None:
    assert "evenly spread" in page.text_of("#workers-note")
    fake.change(lambda status: status["workers"][1].update(connections=1600))
    page.expect("#workers-note", "1 far from the mean")
    assert page.worker(1)["Skew"].startswith("+")
    assert page.count("#workers td.is-warn") == 1


@needs_chromium
def test_shows_that_the_api_is_away_though_the_gateway_is_ready(
    page: Dashboard, fake: FakeAdmin
) -> None:
    away = "API away: Connection refused, since 12:03 UTC"
    fake.change(lambda status: status.update(findings=[away]))
    page.expect("#verdict.warn", "Ready.")
    page.expect("#findings li", away)
    assert page.page.evaluate("document.title").startswith("! ")
    fake.change(lambda status: status.update(findings=[]))
    page.expect("#verdict.ok", "Ready.")


@needs_chromium
def test_shows_findings_until_they_are_gone(page: Dashboard, fake: FakeAdmin) -> None:
    def break_down(status: Json) -> None:
        status |= {"ready": False, "findings": ["worker 1 is down", "redis did not answer"]}
        status["workers"][1] |= {"state": "down", "pid": None, "memory_bytes": None}
        status["redis"]["up"] = False

    def recover(status: Json) -> None:
        status |= {"ready": True, "findings": []}
        status["workers"][1] |= {"state": "serving", "pid": 7777, "memory_bytes": 1_000_000}
        status["redis"]["up"] = True

    fake.change(break_down)
    page.expect("#verdict.bad", "Not ready:")
    page.expect("#findings li", "worker 1 is down")
    page.expect("#findings li", "redis did not answer")
    page.expect("#health dd.is-bad", "does not answer")
    assert page.page.evaluate("document.title").startswith("!! ")
    assert page.worker(1)["State"] == "down"
    assert page.worker(1)["Memory"] == "–"
    page.expect("#log", "worker 1 is down")
    fake.change(recover)
    page.expect("#verdict.ok", "Ready.")
    page.expect("#log", "Redis answers again")
    assert not page.page.evaluate("document.title").startswith("!")


@needs_chromium
def test_is_usable_with_64_workers(browser: Browser) -> None:
    with FakeAdmin(Scene(64)) as fake, open_dashboard(browser, fake.url) as page:
        page.expect_live()
        assert page.count("#workers tbody tr") == 64
        fake.change(lambda status: status["workers"][50].update(connections=2500))
        page.page.wait_for("latest.workers[50].connections > 2000")
        page.press_button("#workers th:nth-child(3) button")
        page.expect("#workers tbody tr:first-child th", "50")
        assert page.page.evaluate("workers.tHead.rows[0].cells[2].ariaSort") == "descending"
        assert page.focused() == "Connections"


@needs_chromium
def test_reads_out_outcomes_but_not_figures(page: Dashboard) -> None:
    for figure in ("#connections", "#messages", "#uptime", ".tile", "#workers", "#health"):
        speaks = f"{figure}:is([aria-live], [role=status], :is([aria-live], [role=status]) *)"
        assert page.count(figure) and not page.count(speaks)
    assert page.page.evaluate("document.querySelector('#outcome').ariaLive") == "polite"


# The token


@needs_chromium
def test_without_token_nothing_can_be_done(page: Dashboard, fake: FakeAdmin) -> None:
    for button in ("#restart", "#drain-host", "#find", "#client-id"):
        assert page.page.evaluate(f"document.querySelector('{button}').disabled")
    assert page.count(".needs-token") == 0
    page.expect("#search-note", "Needs the admin token.")
    page.expect("#examples-note", "Examples need the admin token.")
    page.expect("#token-note", "--admin-token")
    page.wait_for_change("#messages")
    assert not fake.requests


@needs_chromium
def test_wrong_token_is_explained(browser: Browser, fake: FakeAdmin) -> None:
    with open_dashboard(browser, fake.url, "401") as page:
        page.use_token("wrong")
        page.expect("#token-problem", "The gateway does not take this token.")
        page.use_token("schlüssel")
        page.expect("#token-problem", "ASCII only")
        assert page.page.evaluate("sessionStorage.length") == 0
        assert len(fake.requests) == 1
        page.become_admin(TOKEN)
        assert page.count("#token-problem") == 0


@needs_chromium
def test_gateway_without_token_is_explained(browser: Browser) -> None:
    with FakeAdmin(token=None) as fake, open_dashboard(browser, fake.url, "403") as page:
        page.use_token(TOKEN)
        page.expect("#token-problem", "the gateway was started without --admin-token")


@needs_chromium
def test_token_stays_in_this_tab_until_it_is_forgotten(
    browser: Browser, admin: Dashboard, fake: FakeAdmin
) -> None:
    admin.page.call("Page.reload")
    admin.page.wait_for("document.readyState == 'complete' && isAdmin")
    assert admin.page.evaluate("localStorage.length") == 0
    assert admin.page.evaluate("document.cookie") == ""
    assert all(TOKEN not in path for _, path, _ in fake.requests)
    with open_dashboard(browser, fake.url) as other:
        assert not other.page.evaluate("isAdmin")
    admin.press_button("#forget")
    assert admin.page.evaluate("sessionStorage.length") == 0
    assert admin.count("#token") == 1
    assert admin.focused() == "token"
    assert admin.count(".needs-token") == 0


@needs_chromium
def test_shows_the_latest_errors_again_when_there_are_more(
    admin: Dashboard, fake: FakeAdmin
) -> None:
    admin.expect("#examples-note", "No examples are kept.")
    error = {"time_s": START_S, "worker": 2, "cause": "client_gone", "client": "c1", "text": "oops"}
    fake.errors.append(error)
    admin.page.evaluate("examplesAt_ms = -Infinity")  # so that nobody waits for the pause
    fake.change(lambda status: status["errors"].update(timeout=1000))
    admin.expect("#examples tr", "client gone\tc1\toops")
    admin.press_button("#examples button")
    admin.expect("#client-heading", "c1 is not connected")


# A client


@needs_chromium
def test_finds_a_client_and_closes_it(admin: Dashboard, fake: FakeAdmin) -> None:
    fake.clients["c1"] = connected("c1")
    admin.find("c1")
    admin.expect("#client-heading", "c1 is connected")
    assert admin.focused() == "client-heading"
    facts = admin.facts()
    assert facts["Worker"] == "7 of gateway 4f1c2a3b"
    assert facts["Connected since"].startswith(time.strftime("%Y-%m-%d", time.localtime(START_S)))
    assert facts["Messages from it"] == "5"
    assert facts["Address"] == "192.0.2.7"
    admin.press_button("#close-client")
    admin.expect("#confirm-title", "Close c1?")
    admin.page.fill("#close-code", "4001")
    admin.page.fill("#close-reason", "good bye & see you")
    admin.confirm("Close c1?")
    admin.expect_outcome("c1 was closed.")
    assert list(fake.asked("DELETE")) == ["/clients/c1?code=4001&reason=good+bye+%26+see+you"]
    admin.expect("#client-heading", "c1 is not connected")
    assert admin.facts()["… code and cause"] == "4001 closed by request"
    assert admin.facts()["… reason"] == "good bye & see you"
    assert admin.count("#close-client") == 0
    assert admin.focused() == "client-heading"


@needs_chromium
def test_id_goes_out_as_the_client_wrote_it(admin: Dashboard, fake: FakeAdmin) -> None:
    for typed, path in [
        ("a%2Fb", "a%2Fb"),
        ("a/b?c#d", "a/b%3Fc%23d"),
        ("é", "%C3%A9"),
        ("50%", "50%25"),
        ("DE*A:B(E1)!", "DE*A:B(E1)!"),
    ]:
        admin.find(typed)
        admin.page.wait_for(f"shownClient?.path == '{path}'")
        assert fake.requests[-1][1] == f"/clients/{path}"


@needs_chromium
def test_dots_are_no_id(admin: Dashboard, fake: FakeAdmin) -> None:
    before = len(fake.requests)
    for dots in (".", "..", "%2e", ".%2E", "a/../b", "%2e/a"):
        admin.find(dots)
        admin.expect_outcome(f"{dots}: no client can have this id")
    assert len(fake.requests) == before


# Actions


@needs_chromium
@pytest.mark.parametrize(
    ("button", "title", "outcome", "asked"),
    [
        ("#restart", "Restart all workers?", "The rolling restart has begun", "/reload"),
        ("#drain-host", "Drain this host?", "This host is drained", "/drain"),
        ("#workers tr:nth-child(3) button", "Drain worker 2?", "Worker 2 is", "/workers/2/drain"),
    ],
)
def test_asks_before_it_acts(
    admin: Dashboard, fake: FakeAdmin, button: str, title: str, outcome: str, asked: str
) -> None:
    admin.press_button(button)
    admin.expect("#confirm-title", title)
    assert admin.focused() == "cancel"
    admin.page.press("Escape")
    admin.page.wait_for("!document.querySelector('dialog').open")
    assert not list(fake.asked("POST"))
    assert admin.page.evaluate(f"document.activeElement == document.querySelector('{button}')")
    admin.press_button(button)
    admin.press_button("#cancel")
    assert not list(fake.asked("POST"))
    admin.press_button(button)
    admin.confirm(title)
    admin.expect_outcome(outcome)
    assert list(fake.asked("POST")) == [asked]
    admin.press_button("#outcome button")
    assert admin.count("#outcome .band") == 0


@needs_chromium
def test_ends_the_drain_of_the_host(admin: Dashboard, fake: FakeAdmin) -> None:
    fake.change(lambda status: status.update(draining=True, ready=False))
    admin.expect("#verdict", "Draining")
    admin.press_button("#drain-host")
    admin.confirm("End the drain?")
    admin.expect_outcome("This host takes clients again.")
    assert list(fake.asked("DELETE")) == ["/drain"]


@needs_chromium
def test_tells_why_an_action_failed(browser: Browser, fake: FakeAdmin) -> None:
    fake.answers["POST", "/reload"] = (409, {"error": "workers are being replaced already"})
    with open_dashboard(browser, fake.url, "409") as page:
        page.become_admin(TOKEN)
        page.press_button("#restart")
        page.confirm("Restart all workers?")
        page.expect_outcome("Restart all workers: workers are being replaced already")


@needs_chromium
def test_can_be_used_without_a_mouse(page: Dashboard, fake: FakeAdmin) -> None:
    def tab_to(name: str) -> None:
        for _ in range(60):
            page.page.press("Tab")
            assert page.page.evaluate(
                "document.activeElement.matches(':focus-visible')"
                " && getComputedStyle(document.activeElement).outlineStyle == 'solid'"
            )
            if page.focused() == name:
                return
        pytest.fail(f"Tab does not reach {name}")

    page.page.evaluate("document.body.focus()")
    page.page.press("Tab")
    assert page.focused() == "Skip to the figures"
    page.page.press_enter()
    assert page.page.evaluate("location.hash") == "#figures"
    tab_to("token")
    page.page.call("Input.insertText", text=TOKEN)
    page.page.press_enter()
    page.page.wait_for("document.activeElement.id == 'forget'")
    page.page.press("Tab", shift=True)
    page.page.press("Tab", shift=True)
    assert page.focused() == "restart"
    page.page.press("Space")
    page.page.wait_for("document.activeElement.id == 'cancel'")
    page.page.press("Tab")
    assert page.focused() == "confirm-button"
    page.page.press("Tab")  # to the browser's own controls, or round; never behind the dialog
    assert page.page.evaluate("document.activeElement.matches('body, dialog *')")
    page.press_button("#confirm-button")
    page.expect_outcome("The rolling restart has begun")
    assert page.focused() == "restart"
    assert list(fake.asked("POST")) == ["/reload"]


# Text from outside


@needs_chromium
def test_text_from_outside_does_not_become_markup(admin: Dashboard, fake: FakeAdmin) -> None:
    fake.clients["c1"] = connected(HOSTILE)
    fake.clients["c1"]["last_close"] = {"cause": HOSTILE, "reason": HOSTILE, "code": HOSTILE}
    fake.clients["c1"]["connection"] |= {
        "worker": HOSTILE,
        "remote": HOSTILE,
        "subprotocol": HOSTILE,
    }
    error = {"time_s": START_S, "worker": 2, "cause": HOSTILE, "client": HOSTILE, "text": HOSTILE}
    fake.errors.append(error)

    def taint(status: Json) -> None:
        status |= {"version": HOSTILE, "api": HOSTILE, "findings": [HOSTILE]}
        status["errors"][HOSTILE] = 5
        status["pushes"][HOSTILE] = 5
        status["closes"].append({"code": HOSTILE, "cause": HOSTILE, "count": 5})
        status["api_latency"]["counts"][HOSTILE] = [0] * 14
        status["workers"][0]["state"] = HOSTILE

    elements = admin.page.evaluate("document.querySelectorAll('img, script').length")
    admin.page.evaluate("examplesAt_ms = -Infinity")
    fake.change(taint)
    admin.expect("#examples td.text", HOSTILE)
    admin.find("c1")
    admin.expect("#client-heading", HOSTILE)
    assert admin.facts()["… reason"] == HOSTILE
    for part in (
        "#version",
        "#findings",
        "#errors",
        "#pushes",
        "#closes",
        "#latency",
        "#health",
        "#workers",
    ):
        admin.expect(part, HOSTILE)
    admin.press_button("#close-client")
    admin.expect("#confirm-title", HOSTILE)
    assert admin.page.evaluate("document.querySelectorAll('img, script').length") == elements
    assert "taken" not in admin.page.evaluate("document.title")


@needs_chromium
def test_policy_keeps_the_page_from_making_markup(browser: Browser, fake: FakeAdmin) -> None:
    with open_dashboard(browser, fake.url, "TrustedHTML") as page:
        page.expect_live()
        thrown = page.page.evaluate(
            "(() => { try { document.body.innerHTML = 'x' } catch (e) { return e.name } })()"
        )
        assert thrown == "TypeError"
        page.wait_for_change("#messages")


# How it looks


@needs_chromium
def test_phone_has_no_overflow(admin: Dashboard, fake: FakeAdmin) -> None:
    long = "x" * 255
    fake.clients[long] = connected(long)
    fake.change(
        lambda status: status.update(api=f"http://{long}.example/", findings=[long], ready=False)
    )
    admin.find(long)
    admin.expect("#client-heading", long)
    admin.expect("#findings", long)
    for width in (320, 360, 768, 1024, 1920):
        admin.page.resize(width, 740, mobile=width < 500)
        assert admin.page.evaluate(OVERFLOW) == 0, width
    admin.page.resize(360, 740, mobile=True)
    admin.press_button("#close-client")
    assert admin.page.evaluate(OVERFLOW) == 0
    assert admin.page.evaluate("document.querySelector('dialog').scrollWidth") <= 360


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(admin: Dashboard, fake: FakeAdmin, scheme: str) -> None:
    admin.page.prefer_scheme(scheme)
    ground = admin.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(13, 18, 23)") == (scheme == "dark")
    assert admin.page.evaluate(FAINT_TEXTS) == []

    def break_down(status: Json) -> None:
        status |= {"ready": False, "findings": ["worker 1 is down"], "version": "2"}
        status["workers"][0] |= {"state": "down", "pid": None}
        status["workers"][1] |= {"breaker": "open", "connections": 5000, "loop_lag_ms": 900}
        status["redis"]["up"] = False

    fake.clients["c1"] = connected("c1")
    admin.find("c1")
    fake.change(break_down)
    admin.expect("#verdict.bad", "worker 1 is down")
    admin.press_button("#forget")
    assert admin.page.evaluate(FAINT_TEXTS) == []
    admin.page.evaluate("lose('a test')")
    assert admin.page.evaluate(FAINT_TEXTS) == []


# When the gateway is away


@needs_chromium
def test_says_since_when_it_is_disconnected_and_recovers(browser: Browser) -> None:
    with FakeAdmin(Scene(4)) as fake, open_dashboard(browser, fake.url, UNREACHABLE) as page:
        page.expect_live()
        fake.stop()
        page.expect("#lost-since", "Disconnected since")
        page.expect("#lost-why", "The figures below are from then.")
        page.expect("#link.bad", "disconnected")
        page.expect("#verdict.old", "When it was last heard: Ready.")
        assert page.page.evaluate("document.title").startswith("? ")
        connections = page.text_of("#connections")
        page.page.wait_for(
            "document.querySelector('#lost-why').innerText.includes('cannot be reached')"
        )
        assert page.text_of("#connections") == connections
        with FakeAdmin(Scene(4), port=fake.port) as again:
            page.expect_live()
            assert page.count("#lost") == 0
            assert page.count("body.stale") == 0
            page.expect("#log", "the gateway is heard again")
            page.wait_for_change("#messages")
            assert again.port == fake.port


@needs_chromium
def test_notices_a_gateway_that_says_nothing_any_more(page: Dashboard, fake: FakeAdmin) -> None:
    fake.is_silent = True
    page.expect("#lost-why", "The gateway is silent; trying again.")
    fake.is_silent = False
    page.expect_live()


@needs_chromium
def test_explains_that_too_many_watch(browser: Browser, fake: FakeAdmin) -> None:
    fake.is_full = True
    with open_dashboard(browser, fake.url, "503") as page:
        page.expect("#lost-why", "The gateway serves as many pages as it may at once")
        fake.is_full = False
        page.expect_live()


@needs_chromium
def test_offers_the_page_of_another_version(page: Dashboard, fake: FakeAdmin) -> None:
    fake.change(lambda status: status.update(version="9.9.9", uptime_s=1))
    page.expect("#outdated", "another version")
    page.expect("#log", "the gateway was started anew")
    page.press_button("#reload-page")
    page.page.wait_for("document.readyState == 'complete' && firstVersion == '9.9.9'")
    assert page.count("#outdated") == 0
