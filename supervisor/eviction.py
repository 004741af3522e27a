"""Say what it means that Redis drops keys when its memory is full: pure.

What stands there for a client has no expiry, because nobody knows when the client will leave. A
Redis that drops such keys makes clients unreachable one by one, and loses DELETEs, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping


def policy_of(memory: Mapping[str, object]) -> str:
    """Return the policy by what INFO MEMORY says, empty if it does not say."""
    return str(memory.get("maxmemory_policy") or "")


def harm_of(policy: str) -> str:
    """Say why no gateway can work with a policy; nothing if it can."""
    if not policy.startswith("allkeys-"):
        return ""
    return (
        f"its maxmemory-policy is {policy}: "
        "when memory is short it drops entries of clients that are connected; "
        "set maxmemory-policy noeviction"
    )


def doubt_of(policy: str) -> str:
    """Say what is lost with a policy that a gateway can work with; nothing if nothing is."""
    if not policy.startswith("volatile-"):
        return ""
    return (
        f"its maxmemory-policy is {policy}: when memory is short, a push that the API makes before "
        "it has answered a connect may get 404; set maxmemory-policy noeviction"
    )
