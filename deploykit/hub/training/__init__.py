"""The hub as a torch module, with gradients."""
