"""Chat on the demo's page, in a real browser, through the real gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from harness.gateway import GatewayProcess
from harness.ports import free_port

from .browser import CHROMIUM, Browser, Page
from .programs import Program

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all the tests."""
    with Browser() as running:
        yield running


class Demo:
    """Hold the demo API and open its page."""

    def __init__(self, browser: Browser, program: Program, url: str) -> None:
        self._browser = browser
        self._url = url
        self.program = program

    def open(self) -> ChatPage:
        """Open the page in a new window."""
        return ChatPage(self._browser.open(self._url))

    def join(self, name: str) -> ChatPage:
        """Open the page in a new window and connect under this name."""
        page = self.open()
        page.connect(name)
        page.expect_state("connected")
        return page


class ChatPage:
    """Do on the page what a person does, with the keyboard."""

    def __init__(self, page: Page) -> None:
        self._page = page

    def connect(self, name: str) -> None:
        """Type a name and press Enter."""
        self._page.fill("#name", name)
        self._page.press_enter()

    def leave(self) -> None:
        """Press the button that says Leave."""
        self._page.evaluate("document.querySelector('#connect').click()")

    def say(self, text: str) -> None:
        """Send a message to the API."""
        self._page.fill("#text", text)
        self._page.press_enter()

    def push(self, name: str, text: str) -> None:
        """Have the API push a message to somebody."""
        self._page.fill("#to", name)
        self._page.fill("#pushed", text)
        self._page.press_enter()

    def expect_state(self, text: str) -> None:
        """Wait until the page says so about its connection."""
        self._page.wait_for(f"document.querySelector('#state').textContent == {json.dumps(text)}")

    def expect_message(self, text: str) -> None:
        """Wait until a line of the chat reads like this."""
        self._page.wait_for(
            "[...document.querySelectorAll('#log p')]"
            f".some(line => line.textContent == {json.dumps(text)})"
        )

    def expect_online(self, *names: str) -> None:
        """Wait until exactly these are shown as online."""
        self._page.wait_for(
            "[...document.querySelectorAll('#online li')].map(item => item.textContent).join(' ')"
            f" == {json.dumps(' '.join(names))}"
        )

    def expect_push_answer(self, text: str) -> None:
        """Wait until the page tells this answer of the gateway."""
        self._page.wait_for(f"document.querySelector('#answer').textContent == {json.dumps(text)}")

    def count(self, selector: str) -> int:
        """Count the elements that match."""
        number: int = self._page.evaluate(f"document.querySelectorAll('{selector}').length")
        return number


@pytest.fixture(scope="module")
def demo(browser: Browser) -> Iterator[Demo]:
    """Run the demo API behind a gateway of two workers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with GatewayProcess(workers=2, api=url) as gateway:
        command = [
            *(sys.executable, "scripts/demo_api.py", "--listen", f"127.0.0.1:{port}"),
            *("--gateway-port", str(gateway.clients_address[1])),
            *("--push-url", f"http://127.0.0.1:{gateway.pushes_address[1]}"),
        ]
        with Program(command, port=port) as program:
            yield Demo(browser, program, url)
            gateway.stop()  # while its last requests still find the API


def test_two_windows_chat_and_push(demo: Demo) -> None:
    ann = demo.join("ann")
    bob = demo.join("bob")
    for page in (ann, bob):
        page.expect_online("ann", "bob")

    ann.say("hello there")
    ann.expect_message("you said: hello there")

    ann.say("@bob are you hungry?")
    bob.expect_message("ann: are you hungry?")
    ann.expect_message("delivered")
    ann.say("@carol and you?")
    ann.expect_message("carol is not here")

    ann.push("bob", "lunch at noon?")
    ann.expect_push_answer("the gateway answers 200 ok")
    bob.expect_message("ann: lunch at noon?")

    bob.leave()
    bob.expect_state("not connected")
    ann.expect_online("ann")
    demo.program.wait_for_output("bob leaves, 1000 bye")
    ann.leave()


def test_push_to_nobody_is_answered_honestly(demo: Demo) -> None:
    ann = demo.join("ann")
    ann.push("nobody", "anyone?")
    ann.expect_push_answer("the gateway answers 404 no such client")
    ann.leave()


def test_shows_markup_as_text(demo: Demo) -> None:
    ann = demo.join("ann")
    ann.say("<img src=x onerror=alert(1)>")
    ann.expect_message("you said: <img src=x onerror=alert(1)>")
    assert ann.count("#log img") == 0
    ann.leave()


def test_refused_name_is_explained(demo: Demo) -> None:
    page = demo.open()
    page.connect("no spaces")
    page.expect_message("could not connect; a name has letters, digits, - and _")
    page.expect_state("not connected")


def test_taken_name_moves_to_the_new_window(demo: Demo) -> None:
    old = demo.join("ann")
    new = demo.join("ann")
    old.expect_message("closed: 4008 replaced")
    old.expect_state("not connected")
    new.say("still here")
    new.expect_message("you said: still here")
    new.expect_online("ann")
    new.leave()
