"""The network that a search leaves, as files."""
