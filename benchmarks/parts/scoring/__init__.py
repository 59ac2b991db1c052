"""Evaluation of many subnets, timed beside other ways to score them."""
