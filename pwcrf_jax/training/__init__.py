"""Training: the beginning of a run, its loop, its step, its optimizer."""
