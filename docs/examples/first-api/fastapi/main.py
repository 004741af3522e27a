# SECRET=something-long uvicorn main:api --port 8000
import os
import re
import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Annotated, Any

import httpx
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.middleware.sessions import SessionMiddleware

PUSH = os.environ.get("PUSH", "127.0.0.1:7002")
TOKEN = os.environ.get("PUSH_TOKEN", "")  # the gateway's --push-token, if it has one
DATABASE = os.environ.get("DATABASE", "first-api.sqlite")
USERS = {"ann": "secret-of-ann", "bob": "secret-of-bob"}  # a stand-in for yours


def query(sql: str, *values: Any) -> Any:
    """Run one statement and return its first row, if there is one."""
    with closing(sqlite3.connect(DATABASE, isolation_level=None)) as database:
        return database.execute(sql, values).fetchone()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    query(
        "CREATE TABLE IF NOT EXISTS clients (id TEXT PRIMARY KEY,"
        " generation INTEGER, push_url TEXT, sequence INTEGER, answer TEXT)"
    )
    headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
    # Keeps its connections to the push port.
    async with httpx.AsyncClient(timeout=10, headers=headers) as http:
        yield {"http": http}


async def post(http: httpx.AsyncClient, url: str, text: str) -> int:
    try:
        return (await http.post(url, content=text)).status_code
    except httpx.ConnectError:
        return 0


async def push(http: httpx.AsyncClient, to: str, text: str) -> bool:
    """Send a message to a client, at any time.

    The push port finds the worker that has the client. When the port is not reachable or says 503,
    because Redis is away, ask that worker itself.
    """
    status = await post(http, f"http://{PUSH}/{to}", text)
    if status in (0, 503):
        row = await run_in_threadpool(query, "SELECT push_url FROM clients WHERE id = ?", to)
        status = await post(http, row[0], text) if row else status
    return status == 200


async def text_of(request: Request) -> str:
    """Return the body as it is; FastAPI would take one that has no type for JSON."""
    return (await request.body()).decode()


Text = Annotated[str, Depends(text_of)]
Generation = Annotated[int, Header(alias="Ws2api-Generation")]
gateway = APIRouter(prefix="/ws", default_response_class=PlainTextResponse)


@gateway.get("/{id}")
async def connect(
    id: str,
    request: Request,
    generation: Generation,
    push_url: Annotated[str, Header(alias="Ws2api-Push-Url")],
) -> PlainTextResponse:
    """Say ok to a client that wants to connect, or no."""
    user = request.session.get("user")
    if user != id:
        return PlainTextResponse("log in first", 403 if user else 401)
    row = (id, generation, push_url)
    await run_in_threadpool(query, "REPLACE INTO clients VALUES (?, ?, ?, 0, NULL)", *row)
    return PlainTextResponse("ok", headers={"Ws2api-Retry": "safe"})  # `message` notices repeats


@gateway.post("/{id}")
async def message(
    id: str,
    text: Text,
    request: Request,
    generation: Generation,
    sequence: Annotated[int, Header(alias="Ws2api-Sequence")],
) -> str:
    """Take a message of a client: what is returned goes back to it."""
    seen = await run_in_threadpool(
        query,
        "SELECT answer FROM clients WHERE id = ? AND generation = ? AND sequence = ?",
        *(id, generation, sequence),
    )
    if seen:  # the message came before, and the answer was lost on its way
        return str(seen[0])
    answer = f"you said: {text}"
    if to := re.fullmatch("@([a-z]+) (.*)", text, re.DOTALL):  # "@bob hello" is for another
        is_there = await push(request.state.http, to[1], f"{id}: {to[2]}")
        answer = "delivered" if is_there else f"{to[1]} is not here"
    await run_in_threadpool(
        query,
        "UPDATE clients SET sequence = ?, answer = ? WHERE id = ? AND generation = ?",
        *(sequence, answer, id, generation),
    )
    return answer


@gateway.delete("/{id}", status_code=204)
async def disconnect(id: str, reason: Text, generation: Generation) -> None:
    """Forget a client, unless it has connected again meanwhile."""
    row = (id, generation)
    await run_in_threadpool(query, "DELETE FROM clients WHERE id = ? AND generation = ?", *row)
    print(f"{id} left: {reason}", flush=True)


api = FastAPI(lifespan=lifespan)
api.add_middleware(SessionMiddleware, secret_key=os.environ["SECRET"])
api.include_router(gateway)


@api.get("/", response_class=HTMLResponse)
async def form() -> str:
    return """<form method="post" action="/login"><input name="user" placeholder="user">
        <input name="password" type="password" placeholder="password">
        <button>log in</button></form>"""


@api.post("/login", response_class=PlainTextResponse)
async def log_in(
    request: Request, user: Annotated[str, Form()], password: Annotated[str, Form()]
) -> str:
    if secrets.compare_digest(USERS.get(user, ""), password) and password:
        request.session["user"] = user
    return f"you are {request.session.get('user', 'nobody')}"
