"""Random calls against the float64 reference, and what must hold whatever is called."""
