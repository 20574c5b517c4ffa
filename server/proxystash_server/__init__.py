"""The proxystash server and its tiered cache."""

from importlib.metadata import version

__version__ = version("proxystash-server")
