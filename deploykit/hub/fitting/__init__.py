"""Choosing integers and ranges by what the network computes with them."""
