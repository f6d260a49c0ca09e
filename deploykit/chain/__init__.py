"""Chains: a network with early exits as one artifact per segment, run one after the other until an exit is sure."""
