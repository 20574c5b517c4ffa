"""How the tiers are kept in step: changes, reads, faults and what follows from them."""
