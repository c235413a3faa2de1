"""What mkdocs cannot do alone: pages from outside docs/, and pages of API made of docstrings.

A page keeps the links that it has on a git host. A link that leaves docs/ is followed to its file:
if that is a page of the site, it leads there; any other file is copied into the site.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES_ELSEWHERE = ("EXPERIMENTS.md", "kernels/README.md", "slurm/README.md")
# the ops of the kernels share a page, every package of pretrain has its own
TREES = (ROOT / "pretrain", ROOT / "kernels/pretrain_kernels")
# the target of a link, but for those that leave the project or stay on their page
TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
# what a browser fetches by itself
FETCHED = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\s\"'>]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from elsewhere, the files that pages link to, and the pages of API."""
    for name in PAGES_ELSEWHERE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in files.documentation_pages():
        source = Path(str(page.abs_src_path))
        for link in TARGET.finditer(source.read_text(encoding="utf-8")):
            target = (source.parent / link.group(1)).resolve()
            uri = _uri(target, source)
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(target)))
    for uri, text in _api_pages():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the site has their targets."""
    if page.file.abs_src_path is None:
        return markdown
    source = Path(page.file.abs_src_path)

    def moved(link: re.Match[str]) -> str:
        target = _uri((source.parent / link.group(1)).resolve(), source)
        return os.path.relpath(target, Path(page.file.src_uri).parent) + (link.group(2) or "")

    return TARGET.sub(moved, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site whose pages ask another server for anything.

    Raises PluginError that names the page and the address.
    """
    for page in Path(config.site_dir).rglob("*.html"):
        if found := FETCHED.search(page.read_text(encoding="utf-8")):
            raise PluginError(
                f"{page} fetches {found.group(1)}; put a copy into docs/, or link to it."
            )


def _uri(target: Path, source: Path) -> str:
    """Where the site has a file: as in docs/, or else as in the repository.

    Raises PluginError if there is no such file.
    """
    if not target.is_file():
        raise PluginError(
            f"{source.relative_to(ROOT)} links to {target}, which is no file; folders have no page."
        )
    return str(target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT))


def _api_pages() -> Iterator[tuple[str, str]]:
    """Address and text of a list of packages, and of a page for each."""
    packages = [path.parent for path in sorted(TREES[0].rglob("__init__.py"))] + [TREES[1]]
    lines = ["# API", "", "From the docstrings, package by package.", "", "| | |", "|---|---|"]
    for package in packages:
        name = _name(package)
        paths = package.rglob("*.py") if package in TREES[1:] else package.glob("*.py")
        modules = [_name(path) for path in sorted(paths) if path.name != "__main__.py"]
        first = f"::: {name}\n    options: {{heading_level: 1}}"
        yield f"api/{name}.md", "\n\n".join([first, *(f"::: {module}" for module in modules[1:])])
        lines.append(f"| [{name}]({name}.md) | {_purpose(package / '__init__.py')} |")
    yield "api/index.md", "\n".join(lines)


def _name(path: Path) -> str:
    """A module's or package's name."""
    tree = next(tree for tree in TREES if path.is_relative_to(tree))
    parts = path.relative_to(tree.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _purpose(module: Path) -> str:
    """The first line of its docstring."""
    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n")[0]
