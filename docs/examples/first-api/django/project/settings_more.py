# To the end of project/settings.py:
import os

INSTALLED_APPS += ["chat"]  # noqa: F821
# The gateway asks under the name that stands in its --api; another one gets 400.
ALLOWED_HOSTS += ["127.0.0.1"]  # noqa: F821
WS2API_PUSH = os.environ.get("WS2API_PUSH", "http://127.0.0.1:7002")
PUSH_TOKEN = os.environ.get("PUSH_TOKEN", "")  # the gateway's --push-token, if it has one
