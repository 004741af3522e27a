"""Play the admin port or the push port: record each request, answer as the test scripts it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from aiohttp import web

from .loop_thread import LoopThread


@dataclass(frozen=True)
class Received:
    """Hold one request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


@dataclass
class _Answer:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class FakePort:
    """Serve scripted answers on loopback until the context ends.

    Attributes:
        received: every request, oldest first.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._answers: dict[str, list[_Answer]] = {}
        self._thread = LoopThread("fake port")
        self._runner = self._thread.run(self._start())
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    def __enter__(self) -> FakePort:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._thread.run(self._runner.cleanup())
        finally:
            self._thread.close()

    def answer(
        self,
        what: str,
        content: object,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Script the next answer to a request; the last one scripted is given again and again.

        Args:
            what: method and target with its query, as `GET /status`.
            content: bytes are sent as they are, text too, all else as JSON.
        """
        if isinstance(content, str):
            content = content.encode()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self._answers.setdefault(what, []).append(_Answer(status, body, headers or {}))

    @property
    def requests(self) -> list[str]:
        """Method and target of every request, oldest first."""
        return [f"{received.method} {received.target}" for received in self.received]

    async def _start(self) -> web.AppRunner:
        application = web.Application(client_max_size=1 << 30)
        application.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def _handle(self, request: web.Request) -> web.Response:
        received = Received(
            request.method, request.raw_path, dict(request.headers), await request.read()
        )
        self.received.append(received)
        answers = self._answers.get(f"{received.method} {received.target}")
        if not answers:
            return web.Response(status=404, text="404: Not Found")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
