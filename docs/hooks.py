"""What MkDocs does for this site beside Markdown: pages from notebooks, colours of code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pygments.formatters import HtmlFormatter

STYLES = {"light": "friendly", "dark": "github-dark"}


class Notebook(File):
    """A notebook, which is a page like those of Markdown."""

    def is_documentation_page(self) -> bool:
        """Whether it has a place in the menu and links lead to it."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Notebooks become pages."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        urls = config.use_directory_urls
        files.append(Notebook(file.src_uri, config.docs_dir, config.site_dir, urls))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:  # noqa: ARG001
    """The Markdown of a notebook; None leaves other pages as they are."""
    if not isinstance(page.file, Notebook):
        return None
    cells = json.loads(Path(str(page.file.abs_src_path)).read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(text for cell in cells for text in _shown(cell))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:  # noqa: ARG001
    """Links to the colours of code, by the names by which the theme's script switches them."""
    links = (
        f'<link id="hljs-{scheme}" rel="stylesheet" '
        f'href="{get_relative_url(f"code-{scheme}.css", page.url)}">'
        for scheme in STYLES
    )
    return output.replace("</head>", f"{''.join(links)}</head>", 1)


def on_post_build(config: MkDocsConfig) -> None:
    """Colours of code for both schemes."""
    for scheme, style in STYLES.items():
        rules = HtmlFormatter(style=style).get_style_defs(".highlight")
        Path(config.site_dir, f"code-{scheme}.css").write_text(rules, encoding="utf-8")


def _shown(cell: dict[str, Any]) -> Iterator[str]:
    """A cell as Markdown, then what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            yield f"```text\n{text}\n```"
