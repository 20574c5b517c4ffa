"""The backend in append-only JSON Lines files."""
