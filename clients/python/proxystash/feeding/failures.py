"""How a source fails."""

from __future__ import annotations


class SourceError(Exception):
    """What is wrong with a source, for people. It quotes nothing that the source has said."""
