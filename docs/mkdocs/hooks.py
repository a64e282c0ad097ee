"""Links from a page to a file outside docs/ work on GitHub; on the site they become the file's path."""

import logging
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)\)")
LOG = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls this with every page's source."""
    folder, docs = Path(page.file.abs_src_path).parent, Path(config.docs_dir).resolve()

    def named(link: re.Match[str]) -> str:
        text, target = link[1].strip("`"), (folder / link[2]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            LOG.warning("%s links to %s, which does not exist.", page.file.src_uri, link[2])
        path = target.relative_to(docs.parent).as_posix()
        return f"`{path}`" if path.endswith(text) else f"{link[1]} (`{path}`)"

    return LINK.sub(named, markdown)
