"""Drive pages in headless Chromium over the DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

from harness.waiting import DEADLINE_S, until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")

KEYS: Final[dict[str, dict[str, Any]]] = {
    "Enter": {"windowsVirtualKeyCode": 13, "text": "\r"},
    "Tab": {"windowsVirtualKeyCode": 9},
    "Escape": {"windowsVirtualKeyCode": 27},
    "Space": {"windowsVirtualKeyCode": 32, "key": " ", "text": " "},
}

FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


Event = dict[str, Any]


class Browser:
    """Run one Chromium with a profile of its own, and end it.

    Attributes:
        events: what the watched pages have reported so far.
    """

    def __init__(self) -> None:
        assert CHROMIUM
        self._profile = Path(tempfile.mkdtemp(prefix="chromium-"))
        self._log = (self._profile / "log").open("wb")
        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._numbers = itertools.count(1)
        self.events: list[Event] = []
        self._connected = contextlib.ExitStack()
        try:
            self._socket = self._connected.enter_context(
                connect(self._devtools_url(), proxy=None, max_size=None)
            )
        except BaseException:
            self._stop_process()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(ConnectionClosed, TimeoutError):  # it may go before it answers
            self.call("Browser.close")
        self._connected.close()
        self._stop_process()

    def open(self, url: str, *, watched: bool = False) -> Page:
        """Open a URL in a window of its own and wait until it has loaded.

        Args:
            watched: keep what the page reports: its requests, errors and messages.
        """
        target = self.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Runtime", "Log", "Network") if watched else ():
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.wait_for(f"document.readyState == 'complete' && location.href == {json.dumps(url)}")
        return page

    def call(self, method: str, session: str | None = None, /, **params: Any) -> Any:
        """Send a command and return its result; events that come first are kept."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        self._socket.send(json.dumps(command))
        while True:
            answer = json.loads(self._socket.recv(DEADLINE_S))
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def _devtools_url(self) -> str:
        """Wait for the file in which Chromium tells the port that it chose."""
        file = self._profile / "DevToolsActivePort"

        def is_written() -> bool:
            assert self._process.poll() is None, (self._profile / "log").read_text()
            return file.exists() and "\n" in file.read_text()

        until(is_written, timeout_s=2 * DEADLINE_S, what="the port of Chromium")
        port, path = file.read_text().split("\n")
        return f"ws://127.0.0.1:{port}{path}"

    def _stop_process(self) -> None:
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()
        shutil.rmtree(self._profile, ignore_errors=True)


class Page:
    """Hold one window."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser = browser
        self._session = session
        self._target = target

    def close(self) -> None:
        """Close the window."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **params: Any) -> Any:
        """Send a command to this window and return its result."""
        return self._browser.call(method, self._session, **params)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Poll a JavaScript expression until it is true, and return its value."""
        try:
            return until(lambda: self.evaluate(expression), what=expression)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows:\n{self.text()}") from None

    def text(self) -> str:
        """Return what the page shows."""
        text: str = self.evaluate("document.body.innerText")
        return text

    def fill(self, selector: str, text: str) -> None:
        """Select what a field holds and type over it."""
        assert self.evaluate(
            "(field => { field.focus(); field.select(); return field == document.activeElement })"
            f"(document.querySelector({json.dumps(selector)}))"
        ), f"{selector} does not take the focus"
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        """Press Enter in whatever has the focus."""
        self.press("Enter")

    def press(self, name: str, *, shift: bool = False) -> None:
        """Press a key of KEYS in whatever has the focus."""
        key = {"key": name, "code": name, "modifiers": 8 if shift else 0, **KEYS[name]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Give the window another size; a mobile one is laid out as on a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def prefer_scheme(self, scheme: str) -> None:
        """Say that the user prefers `dark` or `light`."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self) -> bytes:
        """Return a PNG of what the window shows."""
        data: str = self.call("Page.captureScreenshot", format="png")["data"]
        return base64.b64decode(data)

    def reported(self, method: str) -> list[Any]:
        """Return the parameters of the events of one kind so far; the page must be watched."""
        self.evaluate("0")  # its answer comes after all events until now
        events = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [event["params"] for event in events if event["method"] == method]

    @property
    def requests(self) -> list[str]:
        """The URLs that the page has asked for."""
        return [params["request"]["url"] for params in self.reported("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings: of the page's script, of its policy and of the network."""
        thrown = [str(params) for params in self.reported("Runtime.exceptionThrown")]
        said = [
            str(params["args"])
            for params in self.reported("Runtime.consoleAPICalled")
            if params["type"] in ("error", "warning", "assert")
        ]
        logged = [
            f"{params['entry']['source']}: {params['entry']['text']}"
            for params in self.reported("Log.entryAdded")
            if params["entry"]["level"] in ("error", "warning")
        ]
        return thrown + said + logged
