"""Tests of feeding: sources, fetching, rounds and the command."""
