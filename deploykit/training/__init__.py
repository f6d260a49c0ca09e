"""Training: of students, of what was pruned or decomposed, of codebooks, of integers."""
