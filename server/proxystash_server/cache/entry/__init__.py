"""What an entry is: its fields, their limits, and the sealing of its credentials."""
