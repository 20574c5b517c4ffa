"""The operations whose growth is measured, their names in tables, and how many calls make a round."""

from __future__ import annotations

from typing import Final

# One list of what is measured in every store; a new operation needs a method of this name in proxystash_side.
CALLS: Final = {
    "l1_get": 5000,
    "below_get": 200,
    "l3_get": 200,
    "miss": 1000,
    "get_many": 100,
    "put": 200,
    "replace": 200,
    "put_many": 10,
    "delete": 200,
    "invalidate": 200,
    "list_first": 20,
    "list_deep": 20,
    "list_label": 20,
    "scan_rare": 10,
    "statistics": 500,
    "expiry": 100,
}
# By itself: it looks at everything.
RARE: Final = {"list_rare": 5}
# By itself: it leaves nothing to measure.
CLEAR: Final = "clear"

TITLES: Final = {
    "l1_get": "get, in L1",
    "below_get": "get, in L2",
    "l3_get": "get, in L3 alone",
    "miss": "get, a miss",
    "get_many": "lookup_many of 100, in L1, by entry",
    "put": "put, new",
    "replace": "put, replacing",
    "put_many": "put_many of 100, by entry",
    "delete": "delete",
    "invalidate": "invalidate_by_health",
    "list_first": "list, first page of 100",
    "list_deep": "list, a page of 100 from 90% on",
    "list_label": "list, a page of 100 by a label that one in five has",
    "scan_rare": "one call of List, of a source that 200 have",
    "list_rare": "list, until 100 of a source that 200 have are found",
    "statistics": "get_statistics",
    "expiry": "a pass of the cleaner that finds nothing",
    CLEAR: "clear, by entry",
}
