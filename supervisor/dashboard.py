"""Load the page that the admin port serves at /, and state what a browser may do with it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).with_name("dashboard.html")

_STYLE: Final = re.compile(rb"<style>(.*?)</style>", re.DOTALL)
_SCRIPT: Final = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def load() -> tuple[bytes, str]:
    """Return the page, and the Content-Security-Policy to send with it.

    The policy names the page's style and script by their hashes, so that the browser runs nothing
    else, and lets it talk to the admin port only. It also forbids to make markup from text.
    """
    page = PAGE.read_bytes()
    policy = {
        "default-src": "'none'",
        "style-src": _hashes(_STYLE, page),
        "script-src": _hashes(_SCRIPT, page),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hashes(element: re.Pattern[bytes], page: bytes) -> str:
    digests = [hashlib.sha256(content).digest() for content in element.findall(page)]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
