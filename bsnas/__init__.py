"""BS-NAS: one-shot architecture search with searchable channel numbers.

Its packages are links to the folders beside this one.
"""
