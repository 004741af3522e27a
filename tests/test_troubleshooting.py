"""Hold the pages for operators to the code: they quote only what the gateway says and has."""

from __future__ import annotations

import ast
import asyncio
import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from test_guide_pages import DOCS, PAGES, ROOT, anchors, prose
from ws2api.gateway.counters import Counters
from ws2api.gateway.settings import Settings
from ws2api.supervisor.exposition import Exposition

TROUBLESHOOTING = DOCS / "troubleshooting.md"
LOGS = DOCS / "logs-and-profiles.md"
INDEX = DOCS / "README.md"
OPERATORS_PAGES = (TROUBLESHOOTING, LOGS)
ALERTS = ROOT / "dashboards" / "alerts.yml"

ANY = "…"
"""What stands in a quote for what differs."""

# Inline code of more than one word that is no quote of the gateway: what is typed, configured or
# sent, and what other programs say.
_TYPED = re.compile(
    r"(?:curl|kill|grep|journalctl|ss|printf|systemctl|redis-cli|slowlog|ws2api-ctl|php|echo|POST|GET"
    r"|DELETE|timeout|PHP_CLI_SERVER_WORKERS\S+|proxy_\w+|maxmemory-policy)(?: |$)|later\.|-H "
    r"|--[\w-]+ |(?:Authorization|Content-Type|Retry-After|Ws2api-Retry|Origin): "
)
_OF_OTHERS = frozenset(
    (
        "client, proxy",  # what X-Forwarded-For holds
        "loop lag",  # a column of ws2api-ctl status
        "worker 0",  # a value of the key child
        # od
        r"o k \n",
        "357 273 277 o k",
        '" o k "',
        "< h t m l",
        # Linux, and Redis
        "Connection refused",
        "Too many open files",
        "Cannot assign requested address",
        "OOM command not allowed …",
        "READONLY You can't write against a read only replica",
        "NOPERM …",
    )
)

_LEVELS = ("debug", "info", "warning", "error", "critical")
_LINE = re.compile(rf"\S+Z (?:{'|'.join(_LEVELS)}) +(.*)")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
# The least letters that make a text worth recognising.
_LETTERS = 5
# What may stand for a value that is put into a text.
_VALUE = r"(?:['(]?…[')]?|[^\s…]+)"


def source_files() -> Iterator[Path]:
    """Return the files of the packages."""
    return chain((ROOT / "gateway").rglob("*.py"), (ROOT / "supervisor").rglob("*.py"))


@cache
def templates() -> re.Pattern[str]:
    """Return what matches every text in the source, with anything where a value is put in."""
    found: set[str] = set()
    for path in source_files():
        tree = ast.parse(path.read_text())
        in_f_strings: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                in_f_strings.update(ast.walk(node))
                found.add(_pattern([_text(part) for part in node.values]))
            elif isinstance(node, ast.Constant) and node not in in_f_strings:
                found.add(_pattern([_text(node)]))
    return re.compile("|".join(sorted(found - {""})))


def _text(node: ast.AST) -> str | None:
    """Return the text of a literal, None for anything else."""
    value = node.value if isinstance(node, ast.Constant) else None
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else None


def _pattern(parts: list[str | None]) -> str:
    """Return a pattern for a text; empty when it has too little of its own to be recognised by."""
    letters = sum(c.isalpha() for part in parts if part for c in part)
    if letters < _LETTERS:
        return ""
    pieces = [_without_formats(part.strip("\n")) if part else _VALUE for part in parts]
    return "".join(pieces)


def _without_formats(text: str) -> str:
    return _VALUE.join(re.escape(piece) for piece in re.split(r"%[bdsr]", text))


def is_said(quote: str) -> bool:
    """Tell whether the gateway says what is quoted, as one text or as one that holds another."""
    text = re.sub(r"( \w+=(\"[^\"]*\"|\S+))+$", "", quote)
    if templates().fullmatch(text):
        return True
    colons = [match.start() for match in re.finditer(": ", text)]
    return any(
        (text[:at].replace("-", "_") in Settings.model_fields or is_said(f"{text[:at]}: {ANY}"))
        and is_said(text[at + 2 :])
        for at in colons
        if text[at + 2 :] != ANY
    )


def log_lines(page: Path) -> list[str]:
    """Return the log lines in a page's blocks, from their texts on."""
    return _LINE.findall(page.read_text())


def quotes(page: Path) -> list[str]:
    """Return what a page's prose quotes of the gateway."""
    inline = [code.replace(r"\|", "|") for code in _CODE.findall(prose(page))]
    return [c for c in inline if " " in c and not _TYPED.match(c) and c not in _OF_OTHERS]


@pytest.mark.parametrize("page", OPERATORS_PAGES, ids=lambda page: page.stem)
def test_page_quotes_what_the_gateway_says(page: Path) -> None:
    said = [*quotes(page), *log_lines(page)]
    assert len(said) > 10
    assert not [quote for quote in said if not is_said(quote)]


def test_a_text_that_nobody_says_is_found_out() -> None:
    assert is_said("worker … has not beaten for … s")
    assert is_said("Redis is away link=ws2api-1-subscription worker=1")
    assert not is_said("worker … has stopped beating")
    assert not is_said("Redis has gone")
    assert is_said("listen: cannot listen on …: port in use")
    assert not is_said("listen: cannot listen on …: too tired")


@pytest.mark.parametrize("page", OPERATORS_PAGES, ids=lambda page: page.stem)
def test_page_names_only_keys_that_log_lines_have(page: Path) -> None:
    calls = [
        n for p in source_files() for n in ast.walk(ast.parse(p.read_text())) if is_log_call(n)
    ]
    known = {keyword.arg for call in calls for keyword in call.keywords} | {"process"}
    for line in log_lines(page):
        assert set(re.findall(r" (\w+)=", line)) <= known, line


def is_log_call(node: ast.AST) -> bool:
    """Tell whether this logs a line, or binds what stands in each."""
    return isinstance(node, ast.Call) and (
        (isinstance(node.func, ast.Attribute) and node.func.attr in (*_LEVELS, "bind_contextvars"))
        or (isinstance(node.func, ast.Name) and node.func.id == "log")
    )


@pytest.mark.parametrize("page", OPERATORS_PAGES, ids=lambda page: page.stem)
def test_page_names_only_metrics_that_exist(page: Path) -> None:
    body, _ = asyncio.run(Exposition(Counters(1), 0.0).render(""))
    known = set()
    for family in text_string_to_metric_families(body.decode()):
        known |= {family.name, f"{family.name}_total"}
    # Of a process that lives: these are left out of the exposition of nobody.
    known |= {"ws2api_worker_cpu_seconds_total"}
    assert set(re.findall(r"\bws2api_\w+", page.read_text())) <= known


@pytest.mark.parametrize("page", OPERATORS_PAGES, ids=lambda page: page.stem)
def test_page_names_only_options_that_exist(page: Path) -> None:
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    of_ctl = options_of_ctl()
    for code in _CODE.findall(page.read_text()):
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code))
        if not code.startswith("redis-cli"):
            assert named <= (of_ctl if code.startswith("ws2api-ctl") else options), code
    for block in re.findall(r"^```.*?^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in re.findall(r"ws2api-ctl .*", block):
            assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line)) <= of_ctl, line


def options_of_ctl() -> set[str]:
    """Return the options of ws2api-ctl and of all its commands."""
    sources = [p for p in source_files() if "ctl" in str(p.relative_to(ROOT))]
    text = "".join(path.read_text() for path in sources)
    return set(re.findall(r'"(--[a-z][\w-]*)"', text))


def test_every_finding_of_readyz_is_explained() -> None:
    from ws2api.supervisor import health

    tree = ast.parse(Path(health.__file__).read_text())
    findings = [
        "".join(_text(part) or ANY for part in node.values)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
    ]
    text = TROUBLESHOOTING.read_text()
    said = [f for f in findings if f.startswith(("worker ", "redis"))]
    assert len(said) >= 6
    for finding in said:
        pattern = re.escape(finding).replace(ANY, r"[\w… ]+")
        assert re.search(rf"`{pattern}`", text), finding


def test_every_answer_of_the_push_port_is_explained() -> None:
    from ws2api.gateway.outcomes import ANSWERS

    text = TROUBLESHOOTING.read_text()
    for status, body, _ in ANSWERS:
        code = status[:3].decode()
        if code != "200" and body.strip() != b"bad request":
            assert re.search(rf"^\| {code} \|.*`{re.escape(body.decode().strip())}`", text, re.M), (
                body
            )


def test_every_close_of_the_gateways_own_choice_is_explained() -> None:
    from ws2api.gateway import causes

    text = TROUBLESHOOTING.read_text()
    for code in causes.OF_OUR_CODES:
        assert re.search(rf"^\| {code} \|", text, re.M), code
    for cause in causes.CODES:
        assert f"`{cause}`" in LOGS.read_text(), cause
    for cause in set(causes.OF_REQUESTS) - {causes.ABANDONED, causes.INVALID_REPLY}:
        assert f"`{cause}`" in text, cause


@pytest.mark.skipif(not ALERTS.exists(), reason="dashboards/alerts.yml does not exist yet")
def test_every_alert_has_its_section_here_and_every_section_its_alert() -> None:
    rules = ALERTS.read_text()
    links = re.findall(r"runbook_url: (\S+)", rules)
    names = re.findall(r"- alert: (\w+)", rules)
    assert len(links) == len(names) > 0
    for link in links:
        path, _, anchor = link.partition("#")
        assert anchor in anchors(ROOT / path), link
    sections = re.findall(r"^### (Ws2api\w+)$", prose(TROUBLESHOOTING), re.MULTILINE)
    assert sorted(sections) == sorted(names)


def test_index_names_every_page_once() -> None:
    linked = [
        os.path.normpath(DOCS / link.partition("#")[0])
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", INDEX.read_text())
    ]
    assert len(linked) == len(set(linked))
    pages = {str(page) for page in PAGES if page not in (INDEX, ROOT / "README.md")}
    assert pages <= set(linked), pages - set(linked)
