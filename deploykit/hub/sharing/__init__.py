"""Weights that share their values: clustering, codebooks found again, their training, bits under a budget."""
