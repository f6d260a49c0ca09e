"""Symbols coded in fewer bits without loss: entropy coders in lanes, and weights as streams of symbols."""
