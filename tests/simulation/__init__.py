"""A scraper fleet in simulated time, lent proxies by the server's own pool.

scripts/simulate                 # five seeds; exit code 1 if it fails more than it should
scripts/simulate --seeds 2 --load 2
"""
