"""Sphinx configuration of the documentation site: `make docs`. Nothing is fetched while it is built."""

project = "BS-NAS"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "BS-NAS"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure"]
