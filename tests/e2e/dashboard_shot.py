"""Take the picture of the dashboard that docs/dashboard.md shows, of made-up figures.

cd tests && ../.venv/bin/python -m e2e.dashboard_shot ../docs/plots/dashboard.png
"""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from harness.fake_admin import TOKEN, FakeAdmin, Scene, connected
from PIL import Image

from .browser import Browser
from .dashboard_page import Dashboard

WIDTH = 1280
COLOURS = 128


def main(target: Path) -> None:
    """Write the picture as a PNG."""
    scene = Scene(8, clients=10_000)
    scene.status["time_s"] = time.time()
    scene.status["workers"][5]["connections"] += 700
    with FakeAdmin(scene, interval_s=0.02) as fake, Browser() as browser:
        fake.errors = [
            {
                "time_s": time.time() - 11 * number,
                "worker": number * 3 % 8,
                "cause": "timeout",
                "client": f"charger-{1000 + 37 * number}",
                "text": "the API did not answer in time",
            }
            for number in range(4)
        ]
        client = connected("charger-1037")
        client["connection"]["generation"] = int((time.time() - 5000) * 1e6)
        fake.clients["charger-1037"] = client
        page = browser.open(fake.url)
        dashboard = Dashboard(page)
        page.prefer_scheme("dark")
        page.wait_for("samples.length > 299")
        dashboard.become_admin(TOKEN)
        dashboard.find("charger-1037")
        dashboard.expect("#client-heading", "is connected")
        page.resize(WIDTH, 800)
        page.evaluate("document.activeElement.blur(), scrollTo(0, 0)")
        page.resize(WIDTH, page.evaluate("document.documentElement.scrollHeight"))
        frame = "new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))"
        page.call("Runtime.evaluate", expression=frame, awaitPromise=True)
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
