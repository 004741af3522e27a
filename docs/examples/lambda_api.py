# python3 docs/examples/lambda_api.py, and in front of it scripts/run --api http://127.0.0.1:8000/
"""Call a Lambda handler for what the gateway asks; `api` is WSGI, so any Python server runs it."""

import base64
import json
import os
from urllib.parse import parse_qsl
from uuid import uuid4
from wsgiref.simple_server import make_server

from lambda_function import handler

EVENTS = {"GET": "CONNECT", "POST": "MESSAGE", "DELETE": "DISCONNECT"}
ROUTES = {"send"}  # beside $connect, $disconnect and $default
PASSED_ON = (401, 403, 404, 409, 429)  # what else refuses a client becomes 403


def api(request, start):
    method, id = request["REQUEST_METHOD"], request["PATH_INFO"][1:]
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0))
    result = handler(make_event(request, method, id, body), None) or {}
    status, answer = result.get("statusCode", 200), result.get("body") or ""
    headers = [("Content-Type", "text/plain; charset=utf-8")]
    if method == "GET":
        headers += (result.get("headers") or {}).items()  # as Sec-WebSocket-Protocol
        if 200 <= status < 300:
            status, answer = 200, "ok"
        elif status not in PASSED_ON:
            status = 403
    start(f"{status} -", headers)
    return [answer.encode()]


def make_event(request, method, id, body):
    is_text = request.get("CONTENT_TYPE", "").startswith("text/plain")
    text = body.decode() if is_text else base64.b64encode(body).decode()
    context = {
        "connectionId": id,
        "eventType": EVENTS[method],
        "routeKey": choose_route(method, text),
        "requestId": str(uuid4()),
        "connectedAt": int(request["HTTP_WS2API_GENERATION"]) // 1000,
        "identity": {"sourceIp": request.get("HTTP_X_FORWARDED_FOR", "")},  # on connect only
    }
    event = {"requestContext": context, "isBase64Encoded": method == "POST" and not is_text}
    if method == "GET":
        event["queryStringParameters"] = dict(parse_qsl(request["QUERY_STRING"])) or None
        names = (name for name in request if name.startswith("HTTP_"))
        event["headers"] = {n[5:].replace("_", "-").title(): request[n] for n in names}
    elif method == "POST":
        event["body"] = text
        # The same for a message that comes twice.
        context["messageId"] = f"{context['connectedAt']}-{request['HTTP_WS2API_SEQUENCE']}"
    else:
        context["disconnectStatusCode"] = int(request["HTTP_WS2API_CLOSE_CODE"])
        context["disconnectReason"] = text
    return event


def choose_route(method, text):
    """Do what the expression $request.body.action did."""
    if method != "POST":
        return "$connect" if method == "GET" else "$disconnect"
    try:
        action = json.loads(text)["action"]
    except (ValueError, TypeError, KeyError):
        return "$default"
    return action if action in ROUTES else "$default"


if __name__ == "__main__":
    make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), api).serve_forever()
