"""Search in a trained supernet: evolution under limits, latency tables, and the report of a run."""
