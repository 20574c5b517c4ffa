"""Keeping a server filled from sources: files and URLs that are read again and again. No gRPC here.

`sources` says what a source is and how it is called; `files` and `download` bring its list into a temporary
file, unless it is unchanged; `copying` bounds what that may take; `rounds` decides when, and what follows.
"""
