"""Which image files can be used."""
