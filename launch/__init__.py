"""A sweep over many machines: one manifest of points and tasks, and a file per engine that runs them."""
