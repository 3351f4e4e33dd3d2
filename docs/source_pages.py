"""MkDocs hook that adds files outside docs/ to the site if a page links to them.

Links are relative paths in the checkout, so that they also work on a code host. In the site, a
Python file becomes a page that shows it, a folder a page that lists it, any other file a copy.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and those that the added pages link to."""
    waiting = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        origin = waiting.pop()
        for match in LINK.finditer((ROOT / origin).read_text(encoding="utf-8")):
            target = _target(origin, match["path"])
            uri = _uri(target)
            if files.get_file_from_path(uri) is not None or not (ROOT / target).exists():
                continue  # MkDocs reports missing files
            files.append(_page_of(target, uri, config))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the checkout by links to their pages."""
    uri = page.file.src_uri
    origin = uri if page.file.generated_by else f"{DOCS}/{uri}"

    def link(match: re.Match[str]) -> str:
        target = _target(origin, match["path"])
        if not (ROOT / target).exists():
            return match[0]
        return posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")

    return LINK.sub(link, markdown)


def _target(origin: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _uri(target: str) -> str:
    """Return the path of a file of the checkout among the sources of the site."""
    uri = target.removeprefix(f"{DOCS}/")
    path = ROOT / target
    return f"{uri}.md" if path.is_dir() or path.suffix == ".py" else uri


def _page_of(target: str, uri: str, config: MkDocsConfig) -> File:
    path = ROOT / target
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if child.is_file())
        lines = "\n".join(f"- [{name}]({path.name}/{name})" for name in names)
        return File.generated(config, uri, content=f"# {target}\n\n{lines}\n")
    if path.suffix == ".py":
        code = path.read_text(encoding="utf-8")
        return File.generated(config, uri, content=f"# {target}\n\n````python\n{code}````\n")
    return File.generated(config, uri, abs_src_path=str(path))
