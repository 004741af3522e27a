"""Stand in for boto3.client("apigatewaymanagementapi"), for code that came from API Gateway."""

import json
import os
from datetime import UTC, datetime
from http.client import HTTPConnection
from urllib.parse import quote, urlencode


class ClientError(Exception):
    """Be what the exceptions of botocore are to code that catches them."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class Exceptions:
    class GoneException(ClientError): ...

    class PayloadTooLargeException(ClientError): ...

    class LimitExceededException(ClientError): ...

    class ForbiddenException(ClientError): ...


# What the push port answers, and what API Gateway would have.
ERRORS = {
    404: (410, Exceptions.GoneException),
    413: (413, Exceptions.PayloadTooLargeException),
    429: (429, Exceptions.LimitExceededException),
    401: (403, Exceptions.ForbiddenException),
}


class Connections:
    """Send to connections, ask about them, close them: at the gateway's push port."""

    exceptions = Exceptions

    def post_to_connection(self, *, ConnectionId, Data):  # noqa: N803
        body = Data.encode() if isinstance(Data, str) else bytes(Data)
        self._ask("POST", ConnectionId, body)

    def get_connection(self, *, ConnectionId):  # noqa: N803
        known = json.loads(self._ask("GET", ConnectionId))
        since = datetime.fromtimestamp(known["generation"] / 1e6, UTC)  # it is a time in µs
        return {"ConnectedAt": since, "Identity": {"SourceIp": known["remote"], "UserAgent": ""}}

    def delete_connection(self, *, ConnectionId):  # noqa: N803
        self._ask("DELETE", ConnectionId, query=urlencode({"code": 1000}))

    def _ask(self, method, connection_id, body=None, query=""):
        port = HTTPConnection(os.environ.get("PUSH", "127.0.0.1:7002"), timeout=10)
        headers = {}
        if token := os.environ.get("PUSH_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        try:
            port.request(method, f"/{quote(connection_id, safe='~%')}?{query}", body, headers)
            response = port.getresponse()
            text = response.read().decode()
        finally:
            port.close()
        if response.status != 200:
            status, error = ERRORS.get(response.status, (response.status, ClientError))
            raise error(status, text)
        return text


def client(service, **_):
    """Return what boto3.client returns for this one service; the endpoint is not needed."""
    assert service == "apigatewaymanagementapi"
    return Connections()
