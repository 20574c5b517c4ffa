"""What fleets do with the pool: against a real server, with local proxies and a local site that bans."""
