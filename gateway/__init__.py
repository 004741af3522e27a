"""One worker of the gateway: WebSockets on one side, plain HTTP requests to the API on the other."""
