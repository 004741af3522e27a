# python3 docs/examples/ocpp_back_office.py, and in front of it
# scripts/run --api http://127.0.0.1:8000/ocpp/
import base64
import hmac
import itertools
import json
import os
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPConnection
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server

CALL, RESULT, ERROR = 2, 3, 4  # the first element of a message (OCPP-J 1.6, 4.2)
PASSWORDS = {"CP001": "password-of-CP001", "CP002": "password-of-CP002"}  # a stand-in for a table


@dataclass
class Charger:
    """What the back office knows of one charge point."""

    generation: str = ""  # of its connection; empty while it is away
    connectors: dict = field(default_factory=dict)
    last_seen: tuple = ()  # generation and sequence of its last message, and the answer
    calls: deque = field(default_factory=deque)  # to be sent; the first is under way
    results: dict = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


chargers = {id: Charger() for id in PASSWORDS}
numbers = itertools.count(1)


def push(id, message):
    port = HTTPConnection(os.environ.get("PUSH", "127.0.0.1:7002"), timeout=10)
    headers = {"Authorization": f"Bearer {os.environ.get('PUSH_TOKEN', '')}"}
    try:
        port.request("POST", f"/{id}", json.dumps(message).encode(), headers)
        return port.getresponse().status
    except OSError:
        return 0
    finally:
        port.close()


# The gateway's three requests.


def connect(id, headers):
    if id not in chargers:
        return 404, "no such charge point", {}
    token = base64.b64encode(f"{id}:{PASSWORDS[id]}".encode()).decode()
    if not hmac.compare_digest(headers.get("AUTHORIZATION", ""), f"Basic {token}"):
        return 401, "wrong password", {"WWW-Authenticate": 'Basic realm="chargers"'}
    offered = headers.get("SEC_WEBSOCKET_PROTOCOL", "").replace(" ", "").split(",")
    if "ocpp1.6" not in offered:
        return 403, "ocpp1.6 only", {}
    charger = chargers[id]
    with charger.lock:
        charger.generation = headers["WS2API_GENERATION"]
        charger.calls.clear()  # what was under way on the old connection will not be answered
    return 200, "ok", {"Sec-WebSocket-Protocol": "ocpp1.6", "Ws2api-Retry": "safe"}


def message(id, headers, body):
    charger = chargers[id]
    with charger.lock:
        key = headers["WS2API_GENERATION"], headers["WS2API_SEQUENCE"]
        if charger.last_seen[:2] != key:  # else it comes twice: the answer was lost on its way
            charger.last_seen = *key, answer(id, charger, json.loads(body))
        return 200, charger.last_seen[2], {}


def answer(id, charger, frame):
    kind, unique_id, *rest = frame
    if kind == CALL:
        handle = HANDLERS.get(rest[0])
        if handle is None:
            return json.dumps([ERROR, unique_id, "NotImplemented", rest[0], {}])
        return json.dumps([RESULT, unique_id, handle(charger, rest[1])])
    if charger.calls and charger.calls[0][1] == unique_id:  # RESULT or ERROR of a call of ours
        charger.calls.popleft()
        charger.results[unique_id] = rest
        send_next(id, charger)
    return ""


def disconnect(id, headers):
    charger = chargers[id]
    with charger.lock:
        if charger.generation == headers["WS2API_GENERATION"]:  # else it is back already
            charger.generation = ""
            charger.calls.clear()
    return 204, "", {}


# What charge points ask.


def boot(charger, payload):
    return {"status": "Accepted", "currentTime": now(), "interval": 300}


def heartbeat(charger, payload):
    return {"currentTime": now()}


def status(charger, payload):
    charger.connectors[payload["connectorId"]] = payload["status"]
    return {}


def now():
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


HANDLERS = {"BootNotification": boot, "Heartbeat": heartbeat, "StatusNotification": status}

# What the operator asks: GET /chargers/CP001, POST /chargers/CP001/start with a tag as its body.


def start(id, tag):
    charger, unique_id = chargers[id], f"start-{next(numbers)}"
    with charger.lock:
        charger.calls.append([CALL, unique_id, "RemoteStartTransaction", {"idTag": tag}])
        is_sent = len(charger.calls) > 1 or send_next(id, charger)
    return (202, unique_id, {}) if is_sent else (409, "the charger is not connected", {})


def send_next(id, charger):
    """Send the first call; a charge point gets the next one when it has answered."""
    while charger.calls:
        if push(id, charger.calls[0]) in (200, 504):  # 504: it may have arrived
            return True
        charger.calls.popleft()
    return False


def show(id):
    charger = chargers[id]
    with charger.lock:
        shown = {
            "connected": bool(charger.generation),
            "connectors": charger.connectors,
            "results": charger.results,
        }
    return 200, json.dumps(shown), {}


def api(request, begin):
    headers = {name[5:]: value for name, value in request.items() if name.startswith("HTTP_")}
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0)).decode()
    match request["REQUEST_METHOD"], *request["PATH_INFO"].split("/")[1:]:
        case "GET", "ocpp", id:
            code, text, more = connect(id, headers)
        case "POST", "ocpp", id:
            code, text, more = message(id, headers, body)
        case "DELETE", "ocpp", id:
            code, text, more = disconnect(id, headers)
        case "POST", "chargers", id, "start" if id in chargers:
            code, text, more = start(id, body)
        case "GET", "chargers", id if id in chargers:
            code, text, more = show(id)
        case _:
            code, text, more = 404, "not found", {}
    begin(f"{code} -", [("Content-Type", "text/plain; charset=utf-8"), *more.items()])
    return [text.encode()]


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 1024


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    make_server("127.0.0.1", port, api, Server).serve_forever()
