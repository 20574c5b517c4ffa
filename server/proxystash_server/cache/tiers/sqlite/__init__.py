"""The backend in a SQLite database."""
