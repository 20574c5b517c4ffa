"""What the cache counts, and snapshots of it."""
