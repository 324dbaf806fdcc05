"""The pruning policy: pure functions on vectors of length B and T."""
