"""Scripts that measure speed, results and behaviour under faults, and one that shows the whole pipeline."""
