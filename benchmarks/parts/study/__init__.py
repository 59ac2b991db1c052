"""The study of sampling and shrinking: its cells, baselines, tables and plots."""
