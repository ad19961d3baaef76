"""Host side: from a set's name to uint8 arrays and the indices of every step; numpy and grain, never jax."""
