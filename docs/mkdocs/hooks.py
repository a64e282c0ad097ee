"""Links as GitHub wants them, made fit for the site.

There a page is called by its file's name, and files outside docs/ can be linked to. Here a page has its title from the
navigation, and a file outside docs/ is not there, so that its path stands in for the link. A title that is there for
the tests is left out, and a mean stays on one line with its deviation.
"""

import logging
import re
from pathlib import Path
from typing import Any

CODE = r"^ *```.*?^ *```$|`[^`\n]+`"
LINK = r"(?<!!)\[([^\]]+)\]\(((?!\w+:)[^)#]+)(#[^)]*)?\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL | re.MULTILINE)
NOT_A_TITLE = ' title="not run by the tests"'
LOG = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs calls this with the source of every page."""
    folder, docs = Path(page.file.abs_src_path).parent, Path(config.docs_dir).resolve()

    def fit(link: re.Match[str]) -> str:
        if link[1] is None:  # code
            return link[0].replace(NOT_A_TITLE, "")
        text, target = link[1], (folder / link[2]).resolve()
        if not target.exists():
            LOG.warning("%s links to %s, which does not exist.", page.file.src_uri, link[2])
        if not target.is_relative_to(docs):
            return _path(text, target.relative_to(docs.parent).as_posix())
        if text.endswith(".md"):
            text = files.get_file_from_path(target.relative_to(docs).as_posix()).page.title
        return f"[{text}]({link[2]}{link[3] or ''})"

    return re.sub(
        r" (±) |(?<=\(n) (=) ", lambda sign: f"\u00a0{sign[1] or sign[2]}\u00a0", CODE_OR_LINK.sub(fit, markdown)
    )


def _path(text: str, path: str) -> str:
    return f"`{path}`" if path.endswith(text.strip("`")) else f"{text} (`{path}`)"
