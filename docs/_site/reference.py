"""The API's pages: one for each public module, with the names of its ``__all__`` in that order."""

import importlib
import logging
import re

import mprec

log = logging.getLogger("mkdocs.hooks.reference")

#: Modules beside those that ``help(mprec)`` lists.
OTHERS = {
    "mprec.nn.torchrec": "collections with TorchRec's interface",
    "mprec.derive": "smaller and cheaper paths of one trained model",
    "mprec.row_formats": "formats of tables' rows",
    "mprec.metrics": "qualities of predictions",
    "mprec.errors": "exceptions",
}


def modules() -> dict[str, str]:
    """Each public module and what it holds, as the package's docstring says."""
    lines = re.findall(r"^:mod:`(mprec\.\w+)`\s+(.+)$", mprec.__doc__, flags=re.M)
    return dict(sorted((dict(lines) | OTHERS).items()))


def names(module: str) -> list[str]:
    return list(importlib.import_module(module).__all__)


def uri(module: str) -> str:
    return f"api/{module.removeprefix('mprec.')}.md"


def path(module: str, name: str) -> str:
    """Where the name's documentation is found: its module's, or that of a file of the same name in it."""
    made_in = getattr(getattr(importlib.import_module(module), name), "__module__", None)
    return f"{module}.{name}.{name}" if made_in == f"{module}.{name}" else f"{module}.{name}"


def page(module: str) -> str:
    lines = [f"# {module}", f"::: {module}", *options(members="false", show_root_toc_entry="false")]
    for name in names(module):
        lines += ["", f"::: {path(module, name)}", *options()]
    return "\n".join(lines) + "\n"


def options(**given: str) -> list[str]:
    shown = {"show_root_heading": "false"} if given else {}
    chosen = {"show_if_no_docstring": "false", "inherited_members": "false", **shown, **given}
    return ["    options:", *(f"      {key}: {value}" for key, value in chosen.items())]


def index() -> str:
    pages = {name: uri(name).removeprefix("api/") for name in modules()}
    rows = [f"| [`{name}`]({pages[name]}) | {markdown(what)} |" for name, what in modules().items()]
    return "# API\n\n| module | holds |\n|---|---|\n" + "\n".join(rows) + "\n"


def markdown(text: str) -> str:
    return re.sub(r":mod:`([\w.]+)`", r"`\1`", text).replace("``", "`")


def on_config(config):
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = [{"All modules": "api/index.md"}, *({m: uri(m)} for m in modules())]
    return config


def on_page_content(html, page, config, files):
    """A public name without documentation fails a strict build."""
    for module in modules():
        if page.file.src_uri == uri(module):
            for name in names(module):
                if f'id="{path(module, name)}"' not in html:
                    log.warning("%s.%s has no documentation", module, name)
    return html


def on_files(files, config):
    from mkdocs.structure.files import File  # here: the tests have no MkDocs

    files.append(File.generated(config, "api/index.md", content=index()))
    for module in modules():
        files.append(File.generated(config, uri(module), content=page(module)))
    return files
