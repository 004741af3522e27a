"""Do on the dashboard what an operator does, and hold it to what it must never do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from .browser import Browser, Page

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

FAINT_TEXTS = """
(() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const node = texts.currentNode.parentElement;
    const text = texts.currentNode.data.trim();
    if (!text || !node.checkVisibility() || node.closest("script")) continue;
    const levels = [getComputedStyle(node).color, ground(node)].map(luminance);
    const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${text}`);
  }
  return faint;
})()
"""
"""The texts whose contrast is below what WCAG 2.2 asks for at level AA (1.4.3)."""


@contextmanager
def open_dashboard(browser: Browser, url: str, *expected: str) -> Iterator[Dashboard]:
    """Open the dashboard; in the end nothing was wrong but what was expected.

    Args:
        expected: what a complaint may have in it.
    """
    page = browser.open(url, watched=True)
    dashboard = Dashboard(page)
    yield dashboard
    complaints = [c for c in page.complaints if not any(part in c for part in expected)]
    assert not complaints, complaints
    origins = {urlsplit(asked)[:2] for asked in page.requests if not asked.startswith("data:")}
    assert origins == {urlsplit(url)[:2]}
    page.close()


class Dashboard:
    """Hold the page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def text_of(self, selector: str) -> str:
        """Return the text of the first element that matches; empty if there is none."""
        text: str = self.page.evaluate(
            f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"
        )
        return text

    def texts_of(self, outer: str, inner: str) -> list[list[str]]:
        """Return the texts of what matches within each element that matches."""
        texts: list[list[str]] = self.page.evaluate(
            f"[...document.querySelectorAll({json.dumps(outer)})].map(node =>"
            f" [...node.querySelectorAll({json.dumps(inner)})].map(part => part.innerText))"
        )
        return texts

    def count(self, selector: str) -> int:
        """Count the elements that match and can be seen."""
        number: int = self.page.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})]"
            ".filter(node => node.checkVisibility()).length"
        )
        return number

    def expect(self, selector: str, text: str) -> None:
        """Wait until an element that matches can be seen and has this text in it."""
        self.page.wait_for(
            f"[...document.querySelectorAll({json.dumps(selector)})].some(node =>"
            f" node.checkVisibility() && node.innerText.includes({json.dumps(text)}))"
        )

    def expect_live(self) -> None:
        """Wait until the page says that it is."""
        self.expect("#link", "live")

    def wait_for_change(self, selector: str) -> None:
        """Wait until the text of an element is another one."""
        before = self.text_of(selector)
        self.page.wait_for(
            f"document.querySelector({json.dumps(selector)}).innerText != {json.dumps(before)}"
        )

    def number(self, selector: str) -> float:
        """Return the figure that an element shows."""
        return float(self.text_of(selector).replace(",", ""))

    def use_token(self, token: str) -> None:
        """Type the token and press Enter."""
        self.page.fill("#token", token)
        self.page.press_enter()

    def become_admin(self, token: str) -> None:
        """Use the token, which the gateway must take."""
        self.use_token(token)
        self.expect("#token-state", "token accepted")

    def find(self, client_id: str) -> None:
        """Search a client."""
        self.page.fill("#client-id", client_id)
        self.page.press_enter()

    def press_button(self, selector: str) -> None:
        """Give a button the focus and press Enter."""
        focused = self.page.evaluate(
            f"(node => {{ node.focus(); return node == document.activeElement }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        assert focused, f"{selector} does not take the focus"
        self.page.press_enter()

    def confirm(self, title: str) -> None:
        """Say yes to a question."""
        self.expect("#confirm-title", title)
        self.press_button("#confirm-button")

    def expect_outcome(self, text: str) -> None:
        """Wait until the page tells how an action went."""
        self.expect("#outcome", text)

    def facts(self) -> dict[str, str]:
        """Return what the page tells of the client that was found."""
        facts: dict[str, str] = self.page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('#client-facts dt')]"
            ".map(label => [label.innerText, label.nextSibling.innerText]))"
        )
        return facts

    def worker(self, number: int) -> dict[str, str]:
        """Return a row of the table of workers, by the names of the columns."""
        row: dict[str, str] = self.page.evaluate(
            "(([head], rows, number) => {"
            " const row = rows.find(row => row.cells[0].innerText == number);"
            " return Object.fromEntries([...head.cells].map((cell, index) =>"
            "   [cell.innerText, row?.cells[index].innerText])) })"
            f"(workers.tHead.rows, [...workers.tBodies[0].rows], {number})"
        )
        return row

    def focused(self) -> Any:
        """Return the id of the element with the focus, or its text if it has none."""
        return self.page.evaluate("document.activeElement.id || document.activeElement.innerText")
