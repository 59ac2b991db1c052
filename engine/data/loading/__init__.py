"""Batches for training and scoring, decoded by DALI."""
