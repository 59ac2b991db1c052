"""The supernet, and the plain networks that it releases."""
