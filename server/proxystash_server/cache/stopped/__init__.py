"""Tools for a store that nobody has open: check, repair, rotation of its key."""
