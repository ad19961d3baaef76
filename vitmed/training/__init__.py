"""Device side: steps, optimiser, augmentation, shardings and the one loop."""
