"""Be a supervisor whose workers do what a test wants: `tree_program.py BEHAVIOUR [options]`.

A worker answers each connection with a line of JSON about itself, and closes it. SIGUSR1 blocks its
loop, except for one that is held back, which says that it heard it. A setting of `max_queue = 13`
is one that no worker can boot with.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final, NoReturn

from ws2api.gateway import counters as c
from ws2api.gateway import logs
from ws2api.gateway.address_limit import AddressTable
from ws2api.gateway.settings import Settings, SettingsError
from ws2api.supervisor import listeners
from ws2api.supervisor.configuration import Configuration
from ws2api.supervisor.embedded import EmbeddedServer, find_server
from ws2api.supervisor.errors import GaveUpError
from ws2api.supervisor.parts import Parts
from ws2api.supervisor.tree import Tree
from ws2api.supervisor.watch import Watch

BEAT_S: Final = 0.02
UNBOOTABLE: Final = 13


class Program:
    """Compose a tree out of sockets and counters that are real and workers that are not."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counters = c.Counters(options.workers)
        self.configuration = Configuration(self.read_settings(), self.read_settings)
        self.bound = listeners.bind(self.configuration.settings)

    def read_settings(self) -> Settings:
        """Read the settings, some of them from the test's file."""
        options = self.options
        settings: dict[str, Any] = {
            "workers": options.workers,
            "listen": "127.0.0.1:0",
            "push_listen": "127.0.0.1:0",
            "admin_listen": "127.0.0.1:0",
            "shutdown_timeout": options.timeout,
            "drain_seconds": options.drain,
            "log_level": "debug",
            "log_format": "json",
        }
        if options.settings is not None:
            text = options.settings.read_text()
            if not text.startswith("{"):
                raise SettingsError("no JSON")
            settings |= json.loads(text)
        return Settings(**settings)

    def run(self) -> int:
        options = self.options
        server = EmbeddedServer(find_server()) if options.embedded else None
        self.say("clients", self.bound.client_address.port)
        self.say("admin", self.bound.admin_address.port)
        if server is not None:
            self.say("redis", server.url)
        parts = Parts(
            self.counters,
            AddressTable(self.counters.workers),
            self.configuration,
            self.run_worker,
            self.run_admin,
            server,
            lambda: self.say("ready"),
            watch=Watch(stuck_s=options.stuck, boot_s=options.boot, look_s=options.look),
        )
        with closing(self.bound):
            try:
                return Tree(parts).run()
            except GaveUpError as error:
                self.say("gave-up", error)
                return 3

    def say(self, *words: object) -> None:
        # One write, so that no word of another process lands between.
        os.write(sys.stdout.fileno(), (" ".join(map(str, words)) + "\n").encode())

    def run_admin(self, instance: str) -> int:
        listener = self.bound.keep_admin()
        status = 1 if self.options.behaviour == "has-an-admin-that-fails" else 0
        signal.signal(signal.SIGTERM, lambda *_: os._exit(status))
        answer = {
            "pid": os.getpid(),
            "instance": instance,
            "max_queue": self.configuration.settings.max_queue,
        }
        accept_while(lambda: True, listener, lambda: answer)
        return 0

    def run_worker(self, index: int, bank: int, incarnation: str) -> int:
        return Worker(self, index, bank, incarnation).run()


class Worker:
    """Be one process of a slot."""

    def __init__(self, program: Program, index: int, bank: int, incarnation: str) -> None:
        self.program = program
        self.options = program.options
        self.index = index
        self.incarnation = incarnation
        self.is_first = incarnation.endswith("-0")
        self.bank_number = bank
        self.bank = program.counters.bank(index, bank)
        self.fork_at_birth = self.bank[c.FORK]
        self.is_retiring = False
        self.stops = 0

    def run(self) -> int:
        own = self.program.bound.keep_slot(self.index)
        self.bank[c.STATE] = c.STATE_STARTING
        self.bank[c.PID] = os.getpid()
        self.bank[c.STARTED_S] = int(time.time())
        self.boot()
        self.handle_signals()
        self.bank[c.CONNECTIONS_OPENED] += 1
        self.beat()
        self.bank[c.STATE] = c.STATE_SERVING
        if self.options.behaviour == "fails-late":
            raise RuntimeError("cannot go on")
        accept_while(self.goes_on, own.client, self.describe)
        self.bank[c.STATE] = c.STATE_DRAINING
        while self.options.behaviour == "drains-long" and self.is_retiring and not self.stops:
            self.beat()
            time.sleep(BEAT_S)
            if self.options.gate.exists():
                break
        return 0

    def boot(self) -> None:
        if self.program.configuration.settings.max_queue == UNBOOTABLE:
            os._exit(3)
        match self.options.behaviour:
            case "boot-fails":
                os._exit(3)
            case "raises":
                raise RuntimeError("cannot boot")
            case "boots-for-ever":
                signal.pause()
            case "is-held-back" if not self.is_first:
                while not self.options.gate.exists():
                    time.sleep(0.01)

    def handle_signals(self) -> None:
        if self.options.behaviour == "is-held-back":
            signal.signal(signal.SIGUSR1, self.on_verbose)
        else:
            signal.signal(signal.SIGUSR1, lambda *_: block_for_ever())
        if self.options.behaviour == "is-stubborn" and self.is_first:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        else:
            signal.signal(signal.SIGTERM, self.on_stop)
            signal.signal(signal.SIGUSR2, self.on_retire)

    def on_stop(self, *_: object) -> None:
        self.stops += 1
        self.program.say("stop", self.index, self.stops)

    def on_verbose(self, *_: object) -> None:
        self.program.say(f"verbose-{self.incarnation.split('-', 1)[1]}")

    def on_retire(self, *_: object) -> None:
        self.is_retiring = True

    def goes_on(self) -> bool:
        """Tell whether to go on accepting; called often enough to be the heart, too."""
        self.beat()
        enough = 2 if self.options.behaviour == "waits-for-hurry" else 1
        return not self.is_retiring and self.stops < enough

    def beat(self) -> None:
        self.bank[c.HEARTBEAT_US] = time.monotonic_ns() // 1000

    def describe(self) -> dict[str, object]:
        counters = self.program.counters
        return {
            "index": self.index,
            "pid": os.getpid(),
            "incarnation": self.incarnation,
            "bank": self.bank_number,
            "fork_at_birth": self.fork_at_birth,
            "forks": [counters.bank(self.index, which)[c.FORK] for which in range(c.BANKS)],
            "restarts": counters.value(self.index, c.RESTARTS),
            "opened": counters.value(self.index, c.CONNECTIONS_OPENED),
            "open": counters.connections_open(self.index),
            "current_pid": counters.current(self.index)[c.PID],
            "max_queue": self.program.configuration.settings.max_queue,
            "handles_of_others": count_listening(self.program) - 3,
        }


def block_for_ever() -> NoReturn:
    while True:
        time.sleep(3600)


def count_listening(program: Program) -> int:
    slots = program.bound.slots
    sockets = [item for slot in slots for item in (slot.client, slot.push, slot.private_push)]
    return sum(item.fileno() >= 0 for item in (program.bound.admin, *sockets))


def accept_while(
    goes_on: Callable[[], bool], listener: socket.socket, describe: Callable[[], object]
) -> None:
    while goes_on():
        if not select.select([listener], [], [], BEAT_S)[0]:
            continue
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            continue
        with connection:
            connection.sendall(json.dumps(describe()).encode() + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("behaviour")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--drain", type=float, default=60.0)
    parser.add_argument("--stuck", type=float, default=30.0)
    parser.add_argument("--boot", type=float, default=30.0)
    parser.add_argument("--look", type=float, default=1.0)
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--settings", type=Path)
    logs.configure("debug", "json")
    return Program(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
