"""Training runs: configuration, data, Lightning module, runs."""
