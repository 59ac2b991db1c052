"""An index, or shards, from any source format."""
