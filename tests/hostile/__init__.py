"""Clients that mean harm, or are broken, against a real server, and what they cost the others."""
