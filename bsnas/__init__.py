"""BS-NAS: one-shot architecture search with searchable channel numbers. The packages are links to the folders beside this one."""
