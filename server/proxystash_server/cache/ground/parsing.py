"""Reading what others may have written: bytes that may be anything."""

from __future__ import annotations

import json
from typing import Any, Final

# What comes of reading a record that does not say what it should, or says it in another form.
UNREADABLE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 -- whatever it says
    """The value of a JSON text; raises ValueError for what is none, or is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the text is nested too deeply") from None
