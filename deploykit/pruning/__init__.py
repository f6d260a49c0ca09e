"""Pruning: what matters least in a network, what can only go together, and the network without it."""
