"""How fast the server and the library are beside what they are compared with: what scripts/bench runs."""
