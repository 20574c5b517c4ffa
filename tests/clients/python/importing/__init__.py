"""Tests of importing what other pools have stored."""
