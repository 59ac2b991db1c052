"""The search space as data: architectures, fair sampling, shrinking, costs. Nothing here needs torch."""
