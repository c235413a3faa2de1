"""The site has a page for every package, follows links out of docs/, and fetches nothing."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

from pretrain.testing import load_module

ROOT = Path(__file__).resolve().parent.parent
hooks = load_module(ROOT / "docs/hooks.py")


def test_every_package_has_a_page_and_every_module_is_on_one() -> None:
    pages = dict(hooks._api_pages())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"]) - {"pretrain.conf"}
    shown = re.findall(r"^::: (\S+)", "\n".join(pages.values()), flags=re.M)
    assert packages <= set(shown)
    assert len(shown) == len(set(shown))
    files = [*(ROOT / "pretrain").rglob("*.py"), *(ROOT / "kernels/pretrain_kernels").rglob("*.py")]
    assert len(shown) == len([path for path in files if path.name != "__main__.py"])


def test_a_link_out_of_docs_leads_to_a_page_or_a_copy() -> None:
    source = ROOT / "docs/tutorials/slurm.md"
    assert hooks._uri(ROOT / "docs/scaling.md", source) == "scaling.md"
    assert hooks._uri(ROOT / "slurm/README.md", source) == "slurm/README.md"
    for wrong in ("docs/no-such-page.md", "conf"):
        with pytest.raises(PluginError, match=rf"docs/tutorials/slurm\.md links to .*{wrong}"):
            hooks._uri(ROOT / wrong, source)


def test_links_are_pointed_to_where_the_site_has_their_targets() -> None:
    page = SimpleNamespace(
        file=SimpleNamespace(abs_src_path=str(ROOT / "slurm/README.md"), src_uri="slurm/README.md")
    )
    text = "[a](../docs/commands.md#submit) [b](#watch) [c](https://example.org)"
    moved = hooks.on_page_markdown(text, page, None, None)
    assert moved == "[a](../commands.md#submit) [b](#watch) [c](https://example.org)"


def test_every_image_is_shown_by_a_page() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    pages += [ROOT / name for name in hooks.PAGES_ELSEWHERE]
    text = "".join(page.read_text() for page in pages)
    shown = set(re.findall(r"images/([\w.-]+\.png)", text))
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ('<script src="https://example.org/a.js"></script>', False),
        ('<link rel="stylesheet" href="//example.org/a.css">', False),
        ("<img alt=x src=https://example.org/a.png>", False),
        ('<a href="https://example.org">there</a> <img src="../images/a.png">', True),
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_refused(
    text: str, is_fine: bool, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text(text)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if is_fine:
        hooks.on_post_build(config)
        return
    with pytest.raises(PluginError, match=r"page\.html fetches \S*//example\.org/a"):
        hooks.on_post_build(config)
