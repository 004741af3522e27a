"""Print the README's table of options, made from the settings; --write puts it there."""

from __future__ import annotations

import argparse
from pathlib import Path

from ws2api.gateway.settings import option_rows

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- options -->\n", "<!-- /options -->"


def table() -> str:
    """Return the table in Markdown, a line for each option."""
    lines = ["| flag | variable | default | meaning |", "| --- | --- | --- | --- |"]
    for row in option_rows():
        flag = f"{row.flag} {row.metavar}".rstrip().replace("|", "\\|")
        default = row.default if " " in row.default or not row.default else f"`{row.default}`"
        meaning = row.description + (" May be repeated." if row.repeatable else "")
        lines.append(f"| `{flag}` | `{row.variable}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def replace_table(text: str) -> str:
    """Return the README's text with a fresh table between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"the README lacks {START.strip()} or {END}")
    return f"{before}{start}\n{table()}\n{end}{after}"


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="update README.md")
    if parser.parse_args().write:
        README.write_text(replace_table(README.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
