"""Run a gateway under random traffic and random faults, and settle what both sides have seen.

Clients send numbered messages, come and go in good order and bad, and stop reading for a while;
the API pushes to them through random workers. Meanwhile workers are killed, stopped and replaced,
and API and Redis refuse, reset, freeze, hang, forget. In the end everything is let settle, and a
ledger shows what became of each message, push and connection. The exit status is 0 when every line
balances, 1 when one does not, 2 when the run could not be finished.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

try:
    import soak_.display as display_module
except ImportError as error:
    sys.exit(f"scripts/soak: {error}: .venv/bin/pip install --editable '.[soak]'")

from harness.ledger import Account
from soak_ import SoakError
from soak_.crowd import Crowd
from soak_.faults import ApiFaults, Lane, OtherFaults
from soak_.resources import Weight, compare, weigh
from soak_.world import World, build, may_be_repeated

WARM_UP_S: Final = 10.0
SETTLED_S: Final = 180.0
"""The longest that it may take until everybody is back and every end reported."""
UNREAD_PER_BREAK: Final = 5
"""Pushes that a client may leave unread when its connection breaks, on average."""
ALLOWED: Final = "its API had allowed it (Ws2api-Retry: safe)"
"""The only cause for which a message may be processed twice."""

Rows = list[tuple[str, str]]


class Soak:
    """Do one run.

    Args:
        options: of the command line.
        world: to be disturbed.
        display: for progress.
    """

    def __init__(
        self, options: argparse.Namespace, world: World, display: display_module.Display
    ) -> None:
        self._options = options
        self._world = world
        self._traffic = world.traffic
        self._display = display
        self._crowd = Crowd(world, options.seed)
        self.problems: list[str] = []

    def run(self) -> None:
        """Warm up, disturb, let settle, compare."""
        before = self._warm_up()
        api = ApiFaults(self._world, self._options.seed)
        others = OtherFaults(self._world, api, self._options.seed)
        lanes = [
            Lane("API faults", api.all(), self._options.seed),
            Lane("other faults", others.all(), self._options.seed),
        ]
        self._crowd.enter("client", self._options.clients)
        self._crowd.begin()
        self._disturb(lanes)
        self._settle()
        self._crowd.leave()
        self._await(self._world.is_all_reported, "every end reported")
        after = self._weigh()
        self._report(lanes, before, after)

    # The course of a run.

    def _warm_up(self) -> dict[str, Weight]:
        """Let the gateway do everything once, so that it has the size that it needs."""
        self._say("warms up")
        self._crowd.enter("early", self._options.clients)
        self._crowd.begin()
        time.sleep(WARM_UP_S)
        self._crowd.rest()
        self._crowd.leave()
        self._await(self._world.is_all_reported, "every end reported")
        return self._weigh()

    def _weigh(self) -> dict[str, Weight]:
        """Weigh the gateway when it has no connection but to Redis."""
        self._traffic.pusher.end()
        self._traffic.api.close()
        self._traffic.api.open()
        self._await(lambda: not self._world.count("api_connections"), "no connection to the API")
        self._world.await_ready()
        return weigh(self._world)

    def _disturb(self, lanes: list[Lane]) -> None:
        for lane in lanes:
            lane.start()
        began = time.monotonic()
        total_s = self._options.minutes * 60
        while (done_s := time.monotonic() - began) < total_s:
            doing = " + ".join(lane.now for lane in lanes if lane.now) or "nothing amiss"
            self._display.show(done_s, f"{doing:40}", self._figures())
            if any(lane.error for lane in lanes) or not self._world.gateway.is_running:
                break
            time.sleep(0.5)
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            if lane.error:
                self.problems.append(str(lane.error))

    def _figures(self) -> str:
        fleet = self._traffic.fleet
        return (
            f"{fleet.open_count} connected, {fleet.answers:,} answers, "
            f"{len(self._traffic.pusher.records):,} pushes, {sum(fleet.ends.values()):,} ends"
        )

    def _settle(self) -> None:
        """Let everybody come back, and see that everybody is served."""
        self._say("settles")
        self._world.to_api.restore()
        self._world.to_redis.restore()
        self._crowd.rest()
        fleet = self._traffic.fleet
        self._world.await_ready()
        self._await(lambda: fleet.open_count == self._options.clients, "everybody connected")
        self._await(self._is_everybody_served, "an answer for everybody")
        self._await(self._world.is_all_reported, "every end reported")
        self._await(lambda: not self._world.count("disconnects_pending"), "nothing left in Redis")

    def _is_everybody_served(self) -> bool:
        """Tell whether the last message of each client is answered; have another one sent if not.

        The last one may be among those that the gateway has given up.
        """
        if not self._traffic.fleet.unanswered:
            return True
        self._crowd.say_one_thing()
        time.sleep(0.5)
        return False

    def _await(self, holds: object, what: str) -> None:
        try:
            self._world.wait_until(holds, what, SETTLED_S)  # type: ignore[arg-type]
        except SoakError as error:
            if not self._world.gateway.is_running:
                raise
            self.problems.append(str(error))

    def _say(self, what: str) -> None:
        self._display.say(f"{what}: {self._options.clients} clients")

    # The ledger.

    def _report(
        self, lanes: list[Lane], before: dict[str, Weight], after: dict[str, Weight]
    ) -> None:
        ends, twice = self._traffic.fleet.ends, self._duplicates()
        broken = sum(count for reason, count in ends.items() if reason != "close")
        ledger = self._traffic.ledger(
            may_give_up=self._count_failed_messages(),
            may_repeat=twice[ALLOWED],
            may_be_unread=UNREAD_PER_BREAK * broken,
        )
        self.problems += ledger.problems + compare(before, after)
        for complaint in self._world.gateway.complaints:
            self.problems.append(f"in the log: {complaint}")
        for lane in lanes:
            _print(lane.name, lane.done)
        _print("clients left without a close frame, or paused", self._crowd.habits)
        _print("connections ended, as the clients saw it", ends)
        for account in ledger.accounts:
            _print(account.name, account)
        _print("messages processed twice, by cause", twice)
        _print("requests of the gateway", self._requests())
        display_module.print_table("processes, before and after", _weights(before, after))

    def _duplicates(self) -> dict[str, int]:
        counts = {ALLOWED: 0, "nothing had allowed it": 0}
        allowed, other = counts
        for life in self._traffic.api.snapshot():
            twice = len(life.posts) - len({sequence for sequence, _ in life.posts})
            counts[allowed if may_be_repeated(life.client_id) else other] += twice
        return counts

    def _requests(self) -> dict[str, int]:
        api = self._traffic.api
        answers = {
            f"{method} that the API answered with {status}": count
            for (method, status), count in sorted(api.answers.items())
        }
        return answers | {
            "messages failed, as the gateway counts them": self._count_failed_messages(),
            "sent again": self._world.count("requests_retried"),
            "connections to the API that a fault has cut": self._world.to_api.connections_cut,
        }

    def _count_failed_messages(self) -> int:
        """Count the messages that the gateway says have failed: what is no connect or disconnect.

        Some of them the API has processed, only its answer did not arrive.
        """
        ends = self._traffic.fleet.ends
        connects = ends["502"] + ends["504"]
        return (
            self._world.count("requests_failed")
            - self._world.count("disconnects_parked")
            - connects
        )


def _print(title: str, counts: dict[str, int] | Account) -> None:
    counted = counts.counts if isinstance(counts, Account) else counts
    rows = [(name, f"{count:,}") for name, count in counted.items()]
    display_module.print_table(title, rows)


def _weights(before: dict[str, Weight], after: dict[str, Weight]) -> Rows:
    return [
        row
        for role in before
        for row in (
            (f"{role}: open files", f"{before[role].files} → {after[role].files}"),
            (
                f"{role}: memory, MiB",
                f"{before[role].memory_bytes / 2**20:.1f} → {after[role].memory_bytes / 2**20:.1f}",
            ),
        )
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=10, help="of disturbance (10)")
    parser.add_argument("--workers", type=int, default=4, help="of the gateway (4)")
    parser.add_argument("--clients", type=int, default=400, help="that are to be connected (400)")
    parser.add_argument("--seed", type=int, help="of what is left to chance (a random one)")
    options = parser.parse_args(arguments)
    if options.minutes <= 0 or options.workers < 1 or options.clients < options.workers:
        parser.error("--minutes, --workers and --clients must be sensible")
    if options.seed is None:
        options.seed = random.randrange(1_000_000)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the ledger, and return the exit status."""
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # so that everything is taken down
        signal.signal(number, lambda *_: sys.exit(2))
    problems: list[str] = []
    try:
        with display_module.Display(options.minutes * 60) as display:
            display.say(f"seed {options.seed}")
            with build(options.workers) as world:
                soak = Soak(options, world, display)
                problems = soak.problems
                soak.run()
    except SoakError as error:
        print(f"scripts/soak: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:  # the gateway did not end in good order
        problems.append(f"the end: {error}")
    print("\n".join(problems) if problems else "everything balances")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
