"""Slow, plain NumPy references in float64. They import nothing of the package they check."""
