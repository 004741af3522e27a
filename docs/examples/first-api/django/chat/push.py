import httpx
from django.conf import settings

from .models import Client

token = settings.PUSH_TOKEN
headers = {"Authorization": f"Bearer {token}"} if token else {}
http = httpx.Client(timeout=10, headers=headers)  # keeps its connections to the push port


def push(to: str, text: str) -> bool:
    """Send a message to a client: from a view, a signal, a task, or manage.py shell.

    The push port finds the worker that has the client. When the port is not reachable or says 503,
    because Redis is away, ask that worker itself.
    """
    status = post(f"{settings.WS2API_PUSH}/{to}", text)
    if status in (0, 503):
        client = Client.objects.filter(id=to).first()
        status = post(client.push_url, text) if client else status
    return status == 200


def post(url: str, text: str) -> int:
    try:
        return http.post(url, content=text).status_code
    except httpx.ConnectError:
        return 0
