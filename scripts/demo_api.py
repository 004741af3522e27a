"""Serve the demo: an ordinary HTTP API that chats with WebSocket clients through the gateway.

It is also an example of the contract. The gateway turns what a client does into three requests,
`GET`, `POST` and `DELETE /<name>`, and delivers what the API sends with `POST` to the push port.
The browser asks for `/` and `/clients`, and its push button for `POST /push`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

PAGE = Path(__file__).with_name("demo.html")
OUR_OWN_PATHS = ("clients", "push")  # not to be had as a name

online: dict[str, str] = {}
"""Who is connected: name -> the generation of that connection."""
lock = threading.Lock()
announcing = threading.Lock()
options = argparse.Namespace()


class Api(BaseHTTPRequestHandler):
    """Answer the gateway and the browser; one thread serves one keep-alive connection."""

    protocol_version = "HTTP/1.1"  # keep-alive: the gateway reuses its connections
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet

    def do_GET(self) -> None:
        """Accept a client, or serve the page: only the gateway sends a generation."""
        if self.generation:
            self.client_connects(self.path.partition("?")[0][1:])
        elif self.path == "/":
            page = PAGE.read_text().replace("GATEWAY_PORT", str(options.gateway_port))
            self.answer(200, page, "text/html; charset=utf-8")
        elif self.path == "/clients":
            self.answer(200, json.dumps(sorted(online)), "application/json")
        else:
            self.answer(404, "not found")

    def client_connects(self, name: str) -> None:
        """Answer `ok` to let the client in; any other text is the error that it gets."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,20}", name) or name in OUR_OWN_PATHS:
            self.answer(200, "a name has 1 to 20 letters, digits, - or _")
            return
        with lock:
            online[name] = self.generation  # a name that is taken moves to the new connection
        log(f"{name} joins")
        self.answer(200, "ok")
        tell_everyone()

    def do_POST(self) -> None:
        """Take a message of a client: what is answered goes back to it as a message."""
        text = self.body()
        name = self.path[1:]
        if self.generation:
            with lock:
                online.setdefault(name, self.generation)  # known again after a restart of this API
            self.answer(200, answer_to(name, text))
        elif self.path == "/push" and self.headers["Content-Type"] == "application/json":
            message = json.loads(text)
            status, reason = push(message["to"], message["text"])
            log(f"push to {message['to']}: {status} {reason}")
            self.answer(200, json.dumps({"status": status, "reason": reason}), "application/json")
        else:
            self.answer(404, "not found")

    def do_DELETE(self) -> None:
        """Note that a client has left, unless its name belongs to a newer connection by now."""
        name, reason = self.path[1:], self.body()
        with lock:
            gone = online.get(name) == self.generation and online.pop(name)
        self.answer(200, "ok")
        if gone:
            log(f"{name} leaves, {self.headers['Ws2api-Close-Code']} {reason}".rstrip())
            tell_everyone()

    @property
    def generation(self) -> str:
        """Name the connection that the gateway speaks for; empty if it is not the gateway."""
        return self.headers.get("Ws2api-Generation", "")

    def body(self) -> str:
        """Read the body of the request."""
        size = int(self.headers.get("Content-Length", 0))
        return self.rfile.read(size).decode(errors="replace")

    def answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        """Send a whole reply at once; its Content-Length keeps the connection usable."""
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Keep quiet: the handlers log what matters."""


def answer_to(name: str, text: str) -> str:
    """Pass "@bob hi" on to bob, as all examples do; say anything else back."""
    to = re.fullmatch(r"@([\w-]+) (.*)", text, re.DOTALL | re.ASCII)
    if not to:
        return f"you said: {text}"
    status, reason = push(to[1], f"{name}: {to[2]}")
    if status == 404:
        return f"{to[1]} is not here"
    return "delivered" if status == 200 else f"not delivered: {status} {reason}"


def push(name: str, text: str) -> tuple[int, str]:
    """Send a message to a client through the gateway and return the gateway's honest answer."""
    url = urlsplit(options.push_url)
    headers = {"Content-Type": "text/plain; charset=utf-8"}
    if token := os.environ.get("DEMO_PUSH_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=10)
    try:
        connection.request("POST", f"/{name}", text.encode(), headers)
        response = connection.getresponse()
        return response.status, response.read().decode().strip()
    except (OSError, http.client.HTTPException, ValueError) as error:
        return 0, f"no answer of the gateway: {error}"
    finally:
        connection.close()


def tell_everyone() -> None:
    """Push the list of names to every client, in a thread: the gateway is not kept waiting."""

    def work() -> None:
        with announcing:  # one list after the other, so that the last one pushed is the newest
            with lock:
                names = sorted(online)
            for name in names:
                push(name, json.dumps({"online": names}))

    threading.Thread(target=work, daemon=True).start()


def log(line: str) -> None:
    """Print a line that shows up at once."""
    print(f"demo API: {line}", flush=True)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description="An HTTP API to try the gateway with.")
    parser.add_argument("--listen", default="127.0.0.1:8000", metavar="HOST:PORT")
    parser.add_argument("--gateway-port", default=7001, type=int, help="where the page connects to")
    parser.add_argument("--push-url", default="http://127.0.0.1:7002", help="the push port")
    parser.parse_args(namespace=options)
    host, _, port = options.listen.rpartition(":")
    ThreadingHTTPServer.request_queue_size = 128
    try:
        server = ThreadingHTTPServer((host, int(port)), Api)
    except OSError as error:
        sys.exit(f"demo API: cannot listen on {options.listen}: {error.strerror}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    server.serve_forever()


if __name__ == "__main__":
    main()
