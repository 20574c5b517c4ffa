"""Reading what other pools have stored, as lists are read. No gRPC here.

`redis_data` gives the elements of a Redis key, live or from a dump; `pools` knows each pool: where it keeps
its proxies, and what it calls things; `scylla` and `rotating_proxies` read theirs. What comes out are raw
records, of which `proxystash.lists` makes entries.
"""
