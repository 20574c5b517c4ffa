"""The gRPC edge: messages, services, errors, streams, the server. It knows the cache by its manager only."""
