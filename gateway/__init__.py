"""One worker: WebSockets on one side, plain HTTP requests to the API on the other."""
