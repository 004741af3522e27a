"""Keep the pages of docs in step with the example files, which tests run, and with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted(path for path in (DOCS / "examples").rglob("*") if path.is_file())

# A link to an example, the rest of its line ending in a colon, and the code.
_SHOWN = re.compile(
    r"\]\(([^)#]*examples/[^)]+)\)[^\n]*:\n\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code."""
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_shows_the_files_that_the_tests_run(page: Path) -> None:
    for link, code in _SHOWN.findall(page.read_text()):
        assert code == (page.parent / link).read_text(), f"{page} differs from {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_links_only_to_what_exists(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def test_every_example_is_shown_on_a_page() -> None:
    readme = (ROOT / "README.md").read_text()
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link, _ in _SHOWN.findall(page.read_text())
    }
    for example in EXAMPLES:
        if example.name != "package-lock.json" and "__pycache__" not in example.parts:
            assert example in shown or example.read_text() in readme, example


def test_pages_name_only_options_that_the_gateway_has() -> None:
    from ws2api.gateway.settings import Settings

    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    known |= {"--help", "--version"}
    for page in PAGES:
        for command in re.findall(
            r"(?:scripts/run|ws2api-supervisor)((?: .+|\\\n)*)", page.read_text()
        ):
            assert set(re.findall(r"--[\w-]+", command)) <= known | {"--help", "--version"}, (
                page,
                command,
            )
