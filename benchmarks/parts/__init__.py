"""What the benchmark scripts are made of."""
