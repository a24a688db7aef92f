"""Docstrings as Markdown: roles become links, ``::`` a colon, and ``#:`` comments documentation."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(?P<short>~?)(?P<name>[\w.]+)`")


class Docstrings(griffe.Extension):
    """Runs on every object of the package as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is None and obj.is_attribute and not obj.is_alias and obj.filepath.suffix == ".py":
            comment = comment_above(obj)
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def comment_above(attribute: griffe.Object) -> str:
    """The lines of ``#:`` over an assignment."""
    lines, first = attribute.lines_collection[attribute.filepath], (attribute.lineno or 1) - 1
    above: list[str] = []
    while first > 0 and lines[first - 1].lstrip().startswith("#:"):
        first -= 1
        above.insert(0, lines[first].lstrip().removeprefix("#:").strip())
    return "\n".join(above)


def as_markdown(text: str, at: griffe.Object) -> str:
    def link(match: re.Match) -> str:
        name = match["name"]
        try:
            target = at.resolve(name)
        except griffe.NameResolutionError:
            target = name
        shown = name.rpartition(".")[2] if match["short"] else name
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    return re.sub(r"::(?=\n\n +)", ":", ROLE.sub(link, text))
