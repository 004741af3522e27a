"""Try whether the API can be reached, and say in the user's words what is in the way.

A connection is opened and closed, nothing is asked: an API need not answer what no client sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from typing import Final

from ws2api.gateway.settings import ApiUrl, Settings

_TIMEOUT_S: Final = 5.0


async def find_fault(settings: Settings) -> str:
    """Return why requests to the API would fail, in one line; empty if nothing is in the way."""
    api = settings.api
    timeout_s = min(_TIMEOUT_S, settings.api_connect_timeout)
    try:
        async with asyncio.timeout(timeout_s):
            await _connect(api, settings)
    except TimeoutError:
        reason = f"no connection within {timeout_s:g} s"
    except ssl.SSLCertVerificationError as error:
        reason = _explain_distrust(error, api, settings)
    except ssl.SSLError as error:
        reason = f"it speaks no TLS there, or none that is known here ({_text(error)})"
    except OSError as error:
        is_system = error.errno is not None and error.errno > 0
        reason = os.strerror(error.errno or 0) if is_system else error.strerror or _text(error)
    except ValueError:  # the codec's, of a label that is empty or too long
        reason = "no host can have this name"
    else:
        return ""
    return f"api: cannot reach {api}: {reason}"


async def _connect(api: ApiUrl, settings: Settings) -> None:
    tls = None
    if api.tls:
        tls = ssl.create_default_context(cafile=str(settings.api_ca) if settings.api_ca else None)
    _, writer = await asyncio.open_connection(api.host, api.port, ssl=tls)
    writer.transport.abort()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _explain_distrust(error: ssl.SSLCertVerificationError, api: ApiUrl, settings: Settings) -> str:
    said = error.verify_message or _text(error)
    if "mismatch" in said.lower() or "not valid for" in said.lower():
        return f"its certificate is for another name than {api.host} ({said})"
    if "expired" in said.lower():
        return f"its certificate has expired ({said})"
    if settings.api_ca is not None:
        return f"no authority in --api-ca {settings.api_ca} vouches for its certificate ({said})"
    return f"its certificate is not trusted; name its authority with --api-ca FILE ({said})"


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
