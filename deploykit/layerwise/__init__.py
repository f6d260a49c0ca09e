"""A network layer by layer: what each multiplies on data, what its outputs matter, its weights fitted anew; budgets."""
