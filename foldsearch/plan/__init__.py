"""Values: plans, prices, proposals, results, fronts. Standard library only."""
