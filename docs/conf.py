"""Sphinx: `make docs`, or `sphinx-build -W -b html docs build/docs`. Every warning is an error, broken links among them."""

project = "cllm4rec"
author = "The cllm4rec authors"
project_copyright = author

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["build"]

# Anchors for headings down to this level, so that pages can link to [sections](page.md#section).
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
# Code blocks are indented by four spaces, without a language.
highlight_language = "none"

html_theme = "furo"
html_title = "cllm4rec"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"sidebar_hide_name": False}
html_static_path = ["_static"]
html_css_files = ["width.css"]
