"""Sphinx's settings. `scripts/docs` builds; warnings are errors there. The table of recipe keys comes from the specs, see fields.py."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fields

project = "Limbeck"
author = "The Limbeck authors"
copyright = "the Limbeck authors, Apache License 2.0"
release = version = version_of("limbeck")
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "Limbeck"
html_show_sphinx = False


def setup(app):
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, fields.fill(source[0])))
