"""Be the gateway that one would write first: a task for each client, a request for each message.

`baseline_naive.py PORT API PING_SECONDS`, where API ends in a slash; scripts/bench measures it.
"""

import asyncio
import sys

import aiohttp
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response


async def main(port: int, api: str, ping_s: float) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=10_000)) as session:

        async def connect(client: ServerConnection, request: Request) -> Response | None:
            async with session.get(api + request.path[1:]) as reply:
                answer = await reply.text()
            return None if answer == "ok" else client.respond(403, answer)

        async def talk(client: ServerConnection) -> None:
            assert client.request
            url = api + client.request.path[1:]
            try:
                async for message in client:
                    async with session.post(url, data=message) as reply:
                        await client.send(await reply.text())
            finally:
                (await session.delete(url, data=client.close_reason or "EOF")).release()

        async with serve(
            talk, "127.0.0.1", port, process_request=connect, backlog=4096, ping_interval=ping_s
        ):
            await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
