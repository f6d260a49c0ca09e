"""What the hub loses, and where."""
