"""Know what others published of the same kind of work: clients that each send now and then.

ws2api's own repository shows three curves, from machines with 32 GB: connections are opened as fast
as the gateway takes them, and each sends a message every 10 seconds, the first one at once. Only
the end points are kept here, and where ws2api has all its connections; the lines in between are
straight and stand for no measurement. The whole curves are CSV files in that repository: give them
to `bench plots`, and they take the place of the lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SOURCE: Final = "github.com/mevdschee/ws2api, docs/*.csv"


@dataclass(frozen=True, slots=True)
class Curve:
    """Hold the published corners of a ramp.

    Attributes:
        name: the implementation.
        file: the stem of the file with the whole curve.
        points: seconds, connections, messages a second.
    """

    name: str
    file: str
    points: tuple[tuple[float, float, float], ...]


CURVES: Final = (
    Curve(
        "ws2api",
        "ws2api_go",
        ((0, 0, 0), (75, 250_000, 25_000), (90, 250_000, 25_000)),
    ),
    Curve(
        "OpenSwoole",
        "ws2api_php_openswoole",
        ((0, 0, 0), (90, 168_000, 17_000)),
    ),
    Curve(
        "Swow",
        "ws2api_php_swow",
        ((0, 0, 0), (35, 62_700, 6_100)),
    ),
)
