"""Watch: the changes of the cache as streams that miss nothing, resume, and hold no thread."""
