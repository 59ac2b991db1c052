"""Public tables of networks that were trained one by one: read, matched to a space, and compared with our costs."""
