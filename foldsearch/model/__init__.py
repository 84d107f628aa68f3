"""What needs torch: the dense model, its evidence, folding, recovery and judging."""
