"""HTML pages that need no other file."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #202020; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.about { color: #606060 } img { max-width: 100%; border: 1px solid #ddd } code { overflow-wrap: anywhere }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The page; `body` is HTML, `title` text."""
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return "\n".join([f"{head}<h1>{escape(title)}</h1>", *body, "</html>", ""])


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def image(title: str, png: bytes) -> str:
    """An image under its heading."""
    name = escape(title)
    return f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of text; `numbers`: the columns that are aligned to the right."""
    right = set(numbers)

    def cells(tag: str, values: Sequence[str]) -> str:
        classes = (' class="number"' if at in right else "" for at in range(len(values)))
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(classes, values, strict=True))

    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', columns)}</tr>\n{lines}</table>"
