"""How `make docs` builds these pages. Every warning is an error: a broken link, a missing name."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# On import Megatron-core tells of GPU extensions that are not needed to read docstrings.
warnings.simplefilter("ignore")
logging.disable(logging.INFO)

from lightning_dhellam import __version__  # noqa: E402

project = "lightning-dhellam"
release = version = __version__
copyright = "the authors of lightning-dhellam, Apache-2.0"

myst_enable_extensions = ["deflist"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"]
nitpicky = True
# Types and errors that autodoc finds itself, most of them of other packages. Pages use `py:obj`.
nitpick_ignore_regex = [(r"py:(class|exc)", r".*")]

myst_heading_anchors = 3
default_role = "code"  # docstrings write `names` as Markdown does
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"lightning-dhellam {release}"
html_show_sourcelink = False
