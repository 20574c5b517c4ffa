"""Hypothesis strategies for what proxies are made of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import strategies as st

from proxystash import CacheEntry, HealthMonitoring, HealthStatus
from proxystash.proxies import SCHEMES, cache_key, parse_proxy_url

_label = st.from_regex(r"\A[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,10}[a-zA-Z0-9_])?\Z")
_names = st.lists(_label, min_size=1, max_size=3).map(".".join).filter(lambda name: not name[-1].isdigit())
_ipv6 = st.ip_addresses(v=6).map(lambda address: f"[{address}]")
hosts = _names | st.ip_addresses(v=4).map(str) | _ipv6
ports = st.integers(1, 65535)

# Everything a username or a password can be: any text without control characters.
credentials = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
moments = st.integers(0, 7 * 10**15).map(
    lambda us: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
)
counts = st.integers(0, 2**31 - 1)

monitoring = st.builds(
    HealthMonitoring,
    last_health_check=st.none() | moments,
    consecutive_health_failures=counts,
    consecutive_health_successes=counts,
    recovery_attempt=counts,
    next_check_time=st.none() | moments,
    last_health_error=st.none() | texts.filter(bool),
    total_health_checks=st.integers(0, 2**63 - 1),
    total_health_check_failures=st.integers(0, 2**63 - 1),
)


@st.composite
def entries(draw: st.DrawFn) -> CacheEntry:
    """Entries as a server returns them, that expire long after any test runs."""
    url = parse_proxy_url(f"{draw(st.sampled_from(SCHEMES))}://{draw(hosts)}:{draw(ports)}").url
    username = draw(st.none() | credentials.filter(bool))
    fetch_time = draw(st.none() | moments)
    ttl = timedelta(days=100 * 365, microseconds=draw(st.integers(0, 10**15)))
    return CacheEntry(
        proxy_url=url,
        key=cache_key(url, username),
        username=username,
        password=draw(st.none() | credentials.filter(bool)),
        source=draw(texts),
        fetch_time=fetch_time,
        ttl=ttl,
        expires_at=None if fetch_time is None else fetch_time + ttl,
        last_accessed=draw(st.none() | moments),
        access_count=draw(st.integers(0, 2**63 - 1)),
        health_status=draw(st.sampled_from(HealthStatus)),
        failure_count=draw(counts),
        max_leases=draw(counts),
        health_monitoring=draw(st.none() | monitoring),
        labels=draw(st.dictionaries(texts, texts, max_size=4)),
    )
