"""Hooks of mkdocs: every notebook becomes a page of the site, and no page fetches anything from elsewhere."""

import json
import logging
import re
from typing import Any

from mkdocs.structure.files import File, Files

from melbo_ray import _HOMES

_log = logging.getLogger("mkdocs.site_hooks")
# What a browser fetches by itself; a link to follow is no such thing.
_FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(https?:)?//[^>]*>")


def on_config(config: Any) -> Any:
    """Let the navigation name notebooks by their files."""
    config.nav = _renamed(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Turn each .ipynb, which mkdocs would only copy, into a page of Markdown at the same place."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        page = File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=markdown(file.content_string))
        files.append(page)
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Let pages link to notebooks by their files, as they do on GitHub; find public names where they are defined."""
    text = text.replace(".ipynb)", ".md)")
    return re.sub(r"(?m)^::: melbo_ray\.(\w+)$", lambda name: f"::: melbo_ray.{_HOMES[name[1]]}.{name[1]}", text)


def on_post_page(html: str, page: Any, **_: Any) -> str:
    """Warn, which a strict build takes for an error, of a page that cannot be read without a network."""
    for fetched in _FETCHED.finditer(html):
        _log.warning("%s fetches %s", page.file.src_uri, fetched[0])
    return html


def markdown(notebook: str) -> str:
    """A notebook's cells as Markdown: prose, code in fences, text and pictures that code put out."""
    return "\n\n".join(_cell(cell) for cell in json.loads(notebook)["cells"])


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "image/png" in data:
        return f'<img alt="the figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    # Four marks, since what a model writes has fences of three.
    return f"````text\n{''.join(data['text/plain']).rstrip()}\n````"


def _renamed(nav: Any) -> Any:
    if isinstance(nav, list):
        return [_renamed(part) for part in nav]
    if isinstance(nav, dict):
        return {title: _renamed(part) for title, part in nav.items()}
    return nav.replace(".ipynb", ".md") if isinstance(nav, str) else nav
