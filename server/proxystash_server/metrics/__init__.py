"""What Prometheus is told of the server, and where it asks."""
