"""Lending the cached proxies to workers, and learning from what became of each use. Below it is no gRPC."""
