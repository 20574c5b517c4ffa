"""The gRPC edge: messages, services, errors, streams, the server. What stands behind it is an Engine."""
