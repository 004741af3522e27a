# python3 docs/examples/channels.py, and in front of it scripts/run --api http://127.0.0.1:8000/
"""Keep the channels that Pushpin kept: who subscribes to what is a table of the API's own."""

import json
import os
import sqlite3
from contextlib import closing
from http.client import HTTPConnection
from wsgiref.simple_server import make_server

DATABASE = os.environ.get("DATABASE", "channels.sqlite")
TOKEN = os.environ.get("PUSH_TOKEN", "")  # the gateway's --push-token, if it has one


def query(sql, *values):
    with closing(sqlite3.connect(DATABASE, isolation_level=None)) as database:
        return database.execute(sql, values).fetchall()


query(
    "CREATE TABLE IF NOT EXISTS subscriptions (channel TEXT, id TEXT, generation TEXT,"
    " PRIMARY KEY (channel, id))"
)


def subscribe(channel, id, generation):
    query("REPLACE INTO subscriptions VALUES (?, ?, ?)", channel, id, generation)


def publish(channel, text):
    """Push to each subscriber, and return how many got it; who is gone is struck off."""
    reached = 0
    port = HTTPConnection(os.environ.get("PUSH", "127.0.0.1:7002"), timeout=10)
    with closing(port):  # one connection for all
        rows = query("SELECT id, generation FROM subscriptions WHERE channel = ?", channel)
        for id, generation in rows:
            headers = {"Ws2api-Generation": generation, "Authorization": f"Bearer {TOKEN}"}
            port.request("POST", f"/{id}", text.encode(), headers)
            answer = port.getresponse()
            answer.read()
            reached += answer.status == 200
            if answer.status in (404, 412):  # gone, or connected anew without a subscription
                leave(id, generation)
    return reached


def leave(id, generation):
    query("DELETE FROM subscriptions WHERE id = ? AND generation = ?", id, generation)


def api(request, start):
    """Let everybody in; {"join": "news"} subscribes, {"to": "news", "text": …} publishes."""
    method, id = request["REQUEST_METHOD"], request["PATH_INFO"][1:]
    generation = request["HTTP_WS2API_GENERATION"]
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0)).decode()
    answer = ""
    if method == "GET":
        answer = "ok"
    elif method == "DELETE":
        leave(id, generation)
    else:
        message = json.loads(body)
        if "join" in message:
            subscribe(message["join"], id, generation)
            answer = f"welcome to {message['join']}"
        else:
            answer = f"reached {publish(message['to'], message['text'])}"
    start("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [answer.encode()]


if __name__ == "__main__":
    make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), api).serve_forever()
