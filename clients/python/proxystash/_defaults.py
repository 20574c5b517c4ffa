"""Where a client looks for its server, and how long it waits, unless it is told otherwise. No gRPC here."""

TARGET_VARIABLE = "PROXYSTASH_TARGET"
DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 5.0
