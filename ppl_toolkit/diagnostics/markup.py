"""Pieces of HTML that the sections of a report share, and the page around them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ppl_toolkit.diagnostics.style import CHAIN_COLOURS, SCRIPT, style_sheet

__all__ = [
    "Section",
    "anchor",
    "bullets",
    "chain_css",
    "chain_keys",
    "document",
    "facts",
    "figure",
    "grid",
    "mark",
    "numbers",
    "paragraph",
    "safe",
    "scrolling",
    "table",
]


class Section(NamedTuple):
    """A part of the page under one heading."""

    ident: str
    title: str
    body: str

    def html(self) -> str:
        """The section as HTML."""
        return (
            f'<section id="{self.ident}" aria-labelledby="{self.ident}-title">'
            f'<h2 id="{self.ident}-title">{safe(self.title)}</h2>{self.body}</section>\n'
        )


def document(
    title: str, heading: str, headline: str, verdict: str, sections: Sequence[Section]
) -> str:
    """A self-contained page: style, script and pictures are inside.

    Args:
        title: of the window.
        heading, headline: the first two lines.
        verdict: HTML before the sections.
        sections: linked from the top.
    """
    links = "".join(f'<li><a href="#{s.ident}">{safe(s.title)}</a></li>' for s in sections)
    body = "".join(section.html() for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{safe(title)}</title><style>{style_sheet()}</style></head><body>\n"
        '<a class="skip" href="#content">Skip to the content</a>'
        f'<header><h1>{safe(heading)}</h1><p class="mute">{safe(headline)}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f'<main id="content">{verdict}{body}</main>'
        "<footer><p>Made by ppl_toolkit from the result alone; it loads nothing.</p></footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def safe(text: object) -> str:
    """Text as HTML."""
    return html.escape(str(text))


def anchor(name: str) -> str:
    """A name as (a part of) an anchor."""
    return "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)


def paragraph(text: str, css: str = "") -> str:
    """Plain text as a paragraph."""
    return f"<p{_css(css)}>{safe(text)}</p>"


def _css(css: str) -> str:
    return f' class="{css}"' if css else ""


def figure(svg: str, title: str, text: str = "", *, ident: str = "", css: str = "") -> str:
    """A picture with its caption above it."""
    name = f' id="{ident}"' if ident else ""
    more = f"<span>{safe(text)}</span>" if text else ""
    return (
        f"<figure{name}{_css(css)}><figcaption><b>{safe(title)}</b>{more}</figcaption>{svg}"
        "</figure>"
    )


def grid(figures: Iterable[str], ident: str = "", css: str = "panels") -> str:
    """Pictures side by side, as many as the window has room for."""
    inside = "".join(figures)
    name = f' id="{ident}"' if ident else ""
    return f'<div class="{css}"{name}>{inside}</div>' if inside else ""


def bullets(texts: Iterable[str]) -> str:
    """Plain texts as a list."""
    items = "".join(f"<li>{safe(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else ""


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """The few figures that matter most, each over its name."""
    inside = "".join(
        f"<div><b>{safe(number)}</b><span class=mute>{safe(name)}</span></div>"
        for number, name in pairs
    )
    return f'<div class="numbers">{inside}</div>' if inside else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values as a description list; values are HTML."""
    rows = "".join(f"<dt>{safe(name)}</dt><dd>{value}</dd>" for name, value in pairs)
    return f"<dl>{rows}</dl>" if rows else ""


def scrolling(table: str, label: str, css: str = "wide fit") -> str:
    """A table in a box of its own, that the keyboard can scroll."""
    return f'<div class="{css}" role="region" tabindex="0" aria-label="{safe(label)}">{table}</div>'


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    label: str,
    *,
    ident: str = "",
    words: Sequence[int] = (),
    fails: Iterable[tuple[int, int]] = (),
) -> str:
    """A small plain table; the first cell of a row is its heading.

    Args:
        heads: headings of the columns.
        rows: texts of the cells.
        label: what the table holds.
        ident: its anchor.
        words: columns to align to the left.
        fails: (row, column) of the cells to mark as failing.
    """
    failing = set(fails)

    def cell(row: int, column: int, text: str) -> str:
        if column == 0:
            return f'<th scope="row">{safe(text)}</th>'
        if (row, column) in failing:
            css = "fails word" if column in words else "fails"
            return f'<td class="{css}">{mark()}{safe(text)}</td>'
        return f"<td{_css('word' if column in words else '')}>{safe(text)}</td>"

    head = "".join(
        f'<th scope="col"{_css("word" if i in words else "")}>{safe(text)}</th>'
        for i, text in enumerate(heads)
    )
    body = "".join(
        f"<tr>{''.join(cell(i, j, text) for j, text in enumerate(row))}</tr>"
        for i, row in enumerate(rows)
    )
    name = f' id="{ident}"' if ident else ""
    return scrolling(
        f"<table{name}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", label
    )


def mark() -> str:
    """The sign of a failing number, for the eye and for the ear."""
    return '<span aria-hidden="true">▲ </span><span class="hidden">fails: </span>'


def chain_css(chain: int) -> str:
    """The style of a chain's lines: colours repeat after six, dashes tell them apart in print."""
    which = chain % CHAIN_COLOURS
    return f"line c{which}" + (f" dash{which}" if which else "")


def chain_keys(chains: int) -> str:
    """What line belongs to what chain."""
    if chains < 2:
        return ""
    items = "".join(
        f'<span><svg viewBox="0 0 30 10" role="img" aria-label="line of chain {c}">'
        f'<path class="{chain_css(c)}" d="M0 5H30"/></svg>chain {c}</span>'
        for c in range(min(chains, CHAIN_COLOURS))
    )
    more = "<span>and so on</span>" if chains > CHAIN_COLOURS else ""
    return f'<div class="keys">{items}{more}</div>'
