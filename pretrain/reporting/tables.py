"""Tables of plain texts as HTML."""

from collections.abc import Iterable, Sequence

from pretrain.reporting.svg import text_of


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A table of plain texts; the last `numbers` columns stand to the right."""
    from_right = len(head) - numbers
    titles = "".join(_cell("th", text, index >= from_right) for index, text in enumerate(head))
    lines = [
        "<tr>"
        + "".join(_cell("td", text, index >= from_right) for index, text in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    if not lines:
        return ""
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(tag: str, text: str, is_number: bool) -> str:
    kind = ' class="number"' if is_number else ""
    return f"<{tag}{kind}>{text_of(text)}</{tag}>"
