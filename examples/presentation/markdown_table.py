"""Tables in Markdown, for every report in this repository."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[str] = ()) -> str:
    """Lines without a newline at the end. The first column is text, as are those named in `text`; the rest are numbers.

    Text stands to the left, numbers to the right. A "|" within a cell is escaped, and its lines stay lines.
    """
    rule = [":--" if index == 0 or name in text else "--:" for index, name in enumerate(header)]
    cells = ([str(cell).replace("|", r"\|").replace("\n", "<br>") for cell in line] for line in (header, rule, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
