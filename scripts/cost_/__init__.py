"""Measure what the gateway costs: the systems under test, and the load upon them."""


class CostError(Exception):
    """Say why a figure could not be had, or that the counts do not add up."""


SENT = b"thirty bytes from one client.."
ANSWER = b"thirty bytes back from the API"
