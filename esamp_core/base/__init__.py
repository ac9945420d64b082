"""What every room stands on: errors, checks, configuration, the tensors that travel, and randomness."""
