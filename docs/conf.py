"""The documentation's settings. ``make docs`` builds it strictly: a warning is an error."""

import contextlib
import pkgutil
import re
import sys

from sphinx.util.nodes import make_refnode

import learned_opt

PACKAGES = ("learned_opt", "tasks", "meta_train")
project = "learned-opt"
author = "the learned-opt authors"
copyright = author
version = release = learned_opt.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a network
]
exclude_patterns = ["_build", "api/*/modules.rst"]
html_theme = "furo"
html_title = "learned-opt"
html_static_path = ["static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes, which types do not
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "count, index"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Reference", "references_style")]
add_module_names = False
nitpicky = True  # every cross-reference leads somewhere
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(jax|optax|np|numpy|hk|chex|haiku|flax|sklearn|scipy|tfds|tensorflow_datasets|pathlib|typing|collections)\..*",
    ),
    ("py:class", r"ArrayTree|Any|Callable|ImportError|.*Error|.*\._.*"),
]
suppress_warnings = ["ref.python"]  # a re-exported name has two places, both right

# The reference: a page a module, made from the packages at each build.
extensions.append("sphinx.ext.apidoc")
apidoc_modules = [
    {
        "path": f"../{package}",
        "destination": f"api/{package}",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 2,
        "exclude_patterns": ["**/commands/**", "**/cli.py"],
    }
    for package in PACKAGES
]


def _escape(app, what, name, obj, options, lines):
    """Bars of norms and sets are text, not substitutions; outside of literals and formulas."""
    del app, what, name, obj, options
    formula = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith(".. math::"):
            formula = indent
        elif formula is not None and line.strip() and indent <= formula:
            formula = None
        if formula is None:
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[index] = "`".join(parts)


def _skip(app, what, name, obj, skip, options):
    """Leaves out fields of named tuples, which docstrings tell, and functions that hide the module they come from."""
    del what, options
    field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if field or f"{app.env.temp_data.get('autodoc:module')}.{name}" in sys.modules else skip


def _elsewhere(app, environment, node, contnode):
    """A name as it stands in the code: by its last parts, and as text where it exists but has no entry."""
    del app
    target, domain = node.get("reftarget", ""), environment.get_domain("py")
    matches = sorted(name for name in domain.objects if name.endswith(f".{target}"))
    if matches:
        found = domain.objects[matches[0]]
        document = node["refdoc"]
        return make_refnode(environment.app.builder, document, found.docname, found.node_id, contnode, matches[0])
    for module in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        with contextlib.suppress(ImportError, AttributeError):
            pkgutil.resolve_name(f"{module}:{target.removeprefix(f'{module}.')}")
            return contnode
    return None


def _studies(app, document, source):
    """The reports' own texts are pages of the site."""
    del app, document
    source[0] = re.sub(r"\]\((?:\.\./)+reports/(\w+)/README\.md", r"](/studies/\1.md", source[0])


def setup(app):
    """Sphinx calls it."""
    app.connect("source-read", _studies)
    app.connect("missing-reference", _elsewhere)
    app.connect("autodoc-process-docstring", _escape)
    app.connect("autodoc-skip-member", _skip)
