"""Be a supervisor whose workers do what a test wants: `tree_program.py BEHAVIOUR [options]`.

A worker answers each connection with a line of JSON about itself, and closes it.
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

from ws2api.gateway import counters as c
from ws2api.gateway import logs
from ws2api.gateway.settings import Settings
from ws2api.supervisor import listeners
from ws2api.supervisor.embedded import EmbeddedServer, find_server
from ws2api.supervisor.errors import GaveUpError
from ws2api.supervisor.tree import Parts, Tree


class Program:
    """Compose a tree out of sockets and counters that are real and workers that are not."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counters = c.Counters(options.workers)
        settings = Settings(
            workers=options.workers,
            listen="127.0.0.1:0",  # type: ignore[arg-type]
            push_listen="127.0.0.1:0",  # type: ignore[arg-type]
            admin_listen="127.0.0.1:0",  # type: ignore[arg-type]
        )
        self.bound = listeners.bind(settings)

    def run(self) -> int:
        server = EmbeddedServer(find_server()) if self.options.embedded else None
        self.say("clients", self.bound.client_address.port)
        self.say("admin", self.bound.admin_address.port)
        if server is not None:
            self.say("redis", server.url)
        parts = Parts(
            self.counters, self.run_worker, self.run_admin, server, lambda: self.say("ready")
        )
        with closing(self.bound):
            try:
                return Tree(parts, shutdown_timeout_s=self.options.timeout).run()
            except GaveUpError as error:
                self.say("gave-up", error)
                return 3

    def say(self, *words: object) -> None:
        print(*words, flush=True)

    def run_admin(self) -> int:
        listener = self.bound.keep_admin()
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        answer_connections(listener, lambda: {"pid": os.getpid()})
        return 0

    def run_worker(self, index: int, incarnation: str) -> int:
        own = self.bound.keep_slot(index)
        slot = self.counters.slot(index)
        slot[c.STATE] = c.STATE_STARTING
        slot[c.PID] = os.getpid()
        fresh = incarnation.endswith("-0")
        match self.options.behaviour:
            case "boot-fails":
                return 3
            case "raises":
                raise RuntimeError("cannot boot")
            case "boots-for-ever":
                signal.pause()
            case "is-held-back" if not fresh:
                while not self.options.gate.exists():
                    time.sleep(0.01)
        stubborn = self.options.behaviour == "is-stubborn" and fresh
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stubborn else lambda *_: os._exit(0))
        slot[c.CONNECTIONS_OPENED] += 1
        slot[c.STATE] = c.STATE_SERVING
        if self.options.behaviour == "fails-late":
            raise RuntimeError("cannot go on")
        answer_connections(
            own.client,
            lambda: {
                "index": index,
                "pid": os.getpid(),
                "incarnation": incarnation,
                "restarts": slot[c.RESTARTS],
                "open": slot[c.CONNECTIONS_OPENED] - slot[c.CONNECTIONS_CLOSED],
                "handles_of_others": count_listening(self) - 3,
            },
        )
        return 0


def count_listening(program: Program) -> int:
    slots = program.bound.slots
    sockets = [item for slot in slots for item in (slot.client, slot.push, slot.private_push)]
    return sum(item.fileno() >= 0 for item in (program.bound.admin, *sockets))


def answer_connections(listener: socket.socket, describe: Callable[[], object]) -> None:
    while True:
        select.select([listener], [], [])
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
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--gate", type=Path)
    logs.configure("debug", "json")
    return Program(parser.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
