import logging
import re

from django.http import HttpRequest, HttpResponse
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.csrf import csrf_exempt

from .models import Client
from .push import push

log = logging.getLogger(__name__)


@method_decorator(csrf_exempt, name="dispatch")  # the gateway has no CSRF token
class GatewayView(View):
    """Answer the gateway; only it may reach this view."""

    def get(self, request: HttpRequest, id: str) -> HttpResponse:
        """Say ok to a client that wants to connect, or no."""
        if not request.user.is_authenticated:
            return text("log in first", status=401)
        if request.user.get_username() != id:
            return text("this is not your name", status=403)
        connection = {
            "generation": request.headers["Ws2api-Generation"],
            "push_url": request.headers["Ws2api-Push-Url"],
            "sequence": 0,
        }
        Client.objects.update_or_create(id=id, defaults=connection)
        return text("ok", headers={"Ws2api-Retry": "safe"})  # `post` notices what it has seen

    def post(self, request: HttpRequest, id: str) -> HttpResponse:
        """Take a message of a client: what is answered goes back to it."""
        # No cookie here, so no request.user: the client was let in under this id.
        client = Client.objects.filter(id=id, generation=request.headers["Ws2api-Generation"])
        sequence = request.headers["Ws2api-Sequence"]
        if seen := client.filter(sequence=sequence).first():
            return text(seen.answer)  # the message came before; the answer was lost on its way
        answer = answer_to(id, request.body.decode())
        client.update(sequence=sequence, answer=answer)
        return text(answer)

    def delete(self, request: HttpRequest, id: str) -> HttpResponse:
        """Forget a client, unless it has connected again meanwhile."""
        Client.objects.filter(id=id, generation=request.headers["Ws2api-Generation"]).delete()
        log.info("%s left: %s", id, request.body.decode())
        return HttpResponse(status=204)


def answer_to(id: str, message: str) -> str:
    to = re.fullmatch("@([a-z]+) (.*)", message, re.DOTALL)
    if not to:
        return f"you said: {message}"
    return "delivered" if push(to[1], f"{id}: {to[2]}") else f"{to[1]} is not here"


def text(body: str, **options: object) -> HttpResponse:
    return HttpResponse(body, content_type="text/plain; charset=utf-8", **options)
