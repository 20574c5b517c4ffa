"""Tests that try to make the store break its promises: kills, faults, races, and long runs.

`scripts/torture` runs them for as long as one likes and prints one summary.
"""
