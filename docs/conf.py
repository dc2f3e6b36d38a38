"""The documentation site. `make docs` builds it from the pages of this folder and from the docstrings.

Every warning fails the build: a link or an anchor that leads nowhere, a page that is in no toctree, a docstring that
does not parse. Nothing on the site comes from the network.
"""

import inspect
import re
from pathlib import Path

import es_jax

project, author, copyright = "es_jax", "The es_jax authors", "The es_jax authors, Apache-2.0"
version = release = es_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = ["*.md"]  # the tables in the folders are files that pages link to, not pages
myst_heading_anchors = 3  # so that page.md#heading means what it means on a git host
default_role = "code"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has the types
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 60
html_theme = "furo"
html_title = "es_jax"
html_copy_source = html_show_sphinx = False


def public_names() -> dict[str, list[str]]:
    """The groups of public names, as the docstring of es_jax lists them."""
    groups = re.findall(r"^    (\w+)  +(\S.*)$", es_jax.__doc__, flags=re.M)
    names = {title: line.split(", ") for title, line in groups}
    listed, public = sorted(name for group in names.values() for name in group), es_jax.__all__
    if listed != public:
        raise ValueError(f"es_jax.__doc__ and es_jax.__all__ differ in {sorted({*listed} ^ {*public}) or 'a repetition'}")
    return names


def directive(name: str) -> str:
    """The lines that document one public name."""
    thing = getattr(es_jax, name)
    if inspect.ismodule(thing):
        return f".. automodule:: {thing.__name__}\n   :members:\n"
    if not inspect.isclass(thing):
        return f".. autofunction:: es_jax.{name}\n"
    return f".. auto{'exception' if issubclass(thing, Exception) else 'class'}:: es_jax.{name}\n   :members:\n"


def read_page(app, docname: str, source: list[str]) -> None:
    """Links to files that are no page become downloads and links to folders text; api.md receives all public names."""

    def link(found: re.Match) -> str:
        text, target = found.groups()
        if (Path(app.srcdir) / target).is_dir():
            return text
        return f"[{text}](path:{target})" if "/" in target and target.endswith(".md") else found[0]

    source[0] = re.sub(r"\[([^]]+)\]\(([\w./-]+)\)", link, source[0])
    if docname == "api":
        for title, names in public_names().items():
            source[0] += f"\n## {title}\n\n```{{eval-rst}}\n{''.join(map(directive, names))}```\n"


def escape(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Our docstrings are plain text with `code`: outside of it, * | and _ mean themselves."""
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            lines[i] = re.sub(r"(`+[^`]+`+)|([*|\\]|_\b)", lambda found: found[1] or "\\" + found[2], line)


def setup(app) -> None:
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", escape, priority=100)
