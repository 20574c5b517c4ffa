"""Checking proxies: trying each against a URL, again and again, and telling the server what came of it.

`probe` tries one proxy, or none; `target` tells whether a failure was the site's; `answers` reads what the
site says of who asked; `checker` decides which proxies, when, and what is stored of them.
"""
