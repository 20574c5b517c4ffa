"""Taking over what proxywhirl 0.3.3 has stored: its JSONL shards, its `l2_cache.db` and its L3 database.

Its credentials can be opened with the Fernet keys that it had in its environment. Where it had none, it made
a new key at each start and kept it nowhere: nobody can open the credentials of such a run any more.
"""
