"""Pictures, tables and the page of a run; `search/report.py` is the script."""
