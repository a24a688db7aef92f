"""Pages and links that lead out of ``docs/``: files of the repository become pages of the site.

README and its like are pages of their own. A file that any page links to is shown under ``source/``; a CSV
file or a picture is there to be fetched. A link to a folder becomes plain text, as a site has no listing of
it. A link to nothing fails a strict build.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: The page and the file of the repository that it is.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}
FETCHED = {".csv", ".png", ".json"}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cmake": "cmake", ".pbtxt": "text"}
#: ``[text](target)`` and ``[text](target#place)``; a picture has "!" in front.
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<place>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```+|~~~+).*?^\1", re.M | re.S)


def path_of(uri: str) -> str:
    """Where in the repository the page's file is."""
    if uri.startswith("source/"):
        return uri.removeprefix("source/").removesuffix(".source.md")
    return PAGES.get(uri) or f"docs/{uri}"


def uri_of(path: str) -> str:
    """The page that a file of the repository is."""
    if path.startswith("docs/") and not path.startswith("docs/_site/"):
        return path.removeprefix("docs/")
    for uri, file in PAGES.items():
        if file == path:
            return uri
    fetched = Path(path).suffix in FETCHED | {".md"}
    return f"source/{path}" if fetched else f"source/{path}.source.md"


def targets(uri: str, markdown: str) -> list[str]:
    """Files and folders of the repository that a page's links lead to, as written there."""
    found = [match for match in LINK.finditer(FENCE.sub("", markdown)) if "://" not in match["target"]]
    return [resolve(uri, match["target"]) for match in found]


def resolve(uri: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path_of(uri)), target))


def shown(config, path: str):
    """The file as one of the site's."""
    from mkdocs.structure.files import File  # here: the tests have no MkDocs

    uri, file = uri_of(path), ROOT / path
    if not uri.endswith(".source.md"):
        return File.generated(config, uri, abs_src_path=str(file))
    language = LANGUAGES.get(file.suffix, "text")
    content = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n````{language}\n{file.read_text()}\n````\n"
    return File.generated(config, uri, content=content)


def on_files(files, config):
    from mkdocs.structure.files import File

    for uri, path in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        if page.src_uri.endswith(".source.md"):
            continue
        for path in targets(page.src_uri, page.content_string):
            inside = (ROOT / path).is_file() and not path.startswith("..")
            if inside and files.get_file_from_path(uri_of(path)) is None and not path.startswith("docs/"):
                files.append(shown(config, path))
                waiting.append(files.get_file_from_path(uri_of(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.endswith(".source.md") or uri.startswith("api/"):
        return markdown

    def moved(match: re.Match) -> str:
        if "://" in match["target"]:
            return match[0]
        path = resolve(uri, match["target"])
        if (ROOT / path).is_dir() and not path.startswith(".."):
            return match["text"]
        to = files.get_file_from_path(uri_of(path))
        if to is None:
            return match[0]  # the build says that it leads nowhere, or it is a page made by another hook
        relative = posixpath.relpath(to.src_uri, posixpath.dirname(uri) or ".")
        return f"[{match['text']}]({relative}{match['place'] or ''})"

    parts, at = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join(parts) + LINK.sub(moved, markdown[at:])
