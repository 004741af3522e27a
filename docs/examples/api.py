# python3 docs/examples/api.py
import os
import re
from http.client import HTTPConnection
from wsgiref.simple_server import make_server


def push(to, text):
    port = HTTPConnection(os.environ.get("PUSH", "127.0.0.1:7002"))
    token = os.environ.get("PUSH_TOKEN", "")
    headers = {"Content-Type": "text/plain", "Authorization": f"Bearer {token}"}
    port.request("POST", f"/{to}", text.encode(), headers)
    return port.getresponse().status == 200


def api(request, start):
    id, method = request["PATH_INFO"][1:], request["REQUEST_METHOD"]
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0)).decode()
    answer = f"you said: {body}"  # goes back to the one who sent the message
    if method == "GET":  # a client connects: ok lets it in
        answer = "ok" if re.fullmatch("[a-z]+", id) else "an id has letters a to z"
    elif method == "DELETE":  # a client has left: the body says why
        print(f"{id} left: {body}")
    elif to := re.fullmatch("@([a-z]+) (.*)", body, re.DOTALL):  # "@bob hello" is for another
        answer = "delivered" if push(to[1], f"{id}: {to[2]}") else f"{to[1]} is not here"
    start("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [answer.encode()]


make_server("127.0.0.1", int(os.environ.get("PORT", "8000")), api).serve_forever()
