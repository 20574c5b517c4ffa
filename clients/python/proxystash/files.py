"""Proxy files: reading the formats that lists are published in, and writing lists. No gRPC here.

docs/lists.md says what is read and how.
"""

from __future__ import annotations

from proxystash.lists.opening import ProgressCallback
from proxystash.lists.outcomes import ProxyFileError, Rejected
from proxystash.lists.reader import (
    FORMATS,
    ListFile,
    ListReader,
    ReadOptions,
    read_proxy_file,
    read_proxy_files,
)
from proxystash.lists.writing import (
    CSV_HEADER,
    EXPORT_FORMATS,
    LINES,
    entry_to_csv,
    entry_to_host_port,
    entry_to_json,
    entry_to_url,
    record_from_entry,
)

__all__ = [
    "CSV_HEADER",
    "EXPORT_FORMATS",
    "FORMATS",
    "LINES",
    "ListFile",
    "ListReader",
    "ProgressCallback",
    "ProxyFileError",
    "ReadOptions",
    "Rejected",
    "entry_to_csv",
    "entry_to_host_port",
    "entry_to_json",
    "entry_to_url",
    "read_proxy_file",
    "read_proxy_files",
    "record_from_entry",
]
