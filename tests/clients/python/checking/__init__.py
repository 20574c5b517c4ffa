"""Tests of checking: probes, what answers tell, and the command."""
