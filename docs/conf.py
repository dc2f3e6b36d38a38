"""The documentation site. `make docs` builds it from the pages of this folder and from the docstrings.

Every warning fails the build: a link or an anchor that leads nowhere, a page that is in no toctree, a docstring that
does not parse. Nothing on the site comes from the network.
"""

import inspect
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

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
smartquotes = False
html_math_renderer = "mathml"
html_theme = "furo"
html_title = "es_jax"
html_copy_source = html_show_sphinx = False


def public_names() -> dict[str, list[str]]:
    """The groups of public names, as the docstring of es_jax lists them."""
    groups = re.findall(r"^    (\w+)  +(\S.*)$", es_jax.__doc__, flags=re.M)
    names = {title: line.split(", ") for title, line in groups}
    listed, public = sorted(name for group in names.values() for name in group), es_jax.__all__
    if listed != public:
        differ = sorted({*listed} ^ {*public}) or "a repetition"
        raise ValueError(f"the docstring of es_jax and es_jax.__all__ differ in {differ}")
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
    unbroken = "\u00a0±\u00a0"  # a number and its error stay on one line of a cell
    source[0] = re.sub(r"^\|.*", lambda row: row[0].replace(" ± ", unbroken), source[0], flags=re.M)
    if docname == "api":
        for title, names in public_names().items():
            source[0] += f"\n## {title}\n\n```{{eval-rst}}\n{''.join(map(directive, names))}```\n"


def literal(line: str) -> str:
    """Outside `code`, * and | and a last _ mean themselves, as in any sentence."""
    return re.sub(r"(`+[^`]+`+)|([*|\\]|_\b)", lambda found: found[1] or "\\" + found[2], line)


def read_docstring(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain Markdown with the sections of Google's style; Sphinx reads reStructuredText."""
    out, kind, last = [], "", ""  # kind: of the block that a line is in; last: the last line that is not empty
    for line, before in zip(lines, ["", *lines], strict=False):
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if words.startswith("```"):
            kind = "" if kind == "fence" else "fence"
            out += ["", " " * indent + "::", ""] if kind else [""]
            continue
        if (kind == "example" and not words) or (words and indent < {"indented": 4, "directive": 1}.get(kind, 0)):
            kind = ""
        if not kind and words.startswith((">>>", ".. ")):
            kind = "example" if words[0] == ">" else "directive"
        if not kind and words and indent >= 4 and not before.strip() and last == last.lstrip():
            kind = "indented"
            out += ["::", ""]
        out.append("  " + line if kind == "fence" else line if kind else literal(line))
        last = line if words else last
    lines[:] = out


def formula(writer, node: nodes.Element) -> None:
    """A formula as MathML, which browsers show without a script from the network."""
    block = isinstance(node, nodes.math_block)
    text = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div style="overflow-x: auto">{text}</div>' if block else text)
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring, priority=100)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
