"""Read what the files of dashboards/ ask Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent.parent.parent / "dashboards"

_SELECTOR = re.compile(r"(?<![\w:])((?:[a-z_]+:)?ws2api_\w+(?::\w+)?|up)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r"(\w+) *(?:=~|!~|!=|=)")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right) *\(([^)]*)\)")


def load_dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    dashboard: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
    return dashboard


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that show something, without the rows' headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def filled_in(expression: str) -> str:
    """Return an expression of the dashboard as Grafana sends it, with everything chosen."""
    expression = re.sub(r"\$__rate_interval\b", "5m", expression)
    return re.sub(r"\$(job|instance)\b", ".*", expression)


def expressions(dashboard: dict[str, Any]) -> list[str]:
    """Return all that the dashboard asks, annotations too."""
    targets = [target for panel in panels(dashboard) for target in panel["targets"]]
    notes = [note for note in dashboard["annotations"]["list"] if "expr" in note]
    return [filled_in(asking["expr"]) for asking in targets + notes]


def rule_expressions() -> dict[str, str]:
    """Return the expression of each alert and of each recording, by name."""
    text = (FOLDER / "alerts.yml").read_text()
    found = {}
    for rule in re.split(r"^      - ", text, flags=re.MULTILINE)[1:]:
        match = re.match(
            r"(?:alert|record): (\S+)\n(?:\s+#.*\n)*\s+expr: (?:>-\n)?(.+?)(?=\n        \w|\Z)",
            rule,
            re.DOTALL,
        )
        assert match, rule
        found[match[1]] = " ".join(match[2].split())
    return found


def selectors(expression: str) -> list[tuple[str, str]]:
    """Return the metrics of an expression, each with what stands between its braces."""
    without_groupings = _GROUPING.sub("", expression)
    return [(match[1], match[2] or "") for match in _SELECTOR.finditer(without_groupings)]


def matched_labels(matchers: str) -> set[str]:
    """Name the labels that a selector compares."""
    return set(_MATCHER.findall(re.sub(r'"[^"]*"', "", matchers)))


def grouping_labels(expression: str) -> set[str]:
    """Name the labels that an expression aggregates or matches by."""
    return {
        label.strip()
        for group in _GROUPING.findall(expression)
        for label in group.split(",")
        if label.strip()
    }
