"""The tiers: one small interface (`base`), one module for each backend."""
