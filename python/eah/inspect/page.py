"""A page in one file: HTML written by hand, its pictures inside, nothing from the network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1c2127; --soft: #5d6670; --line: #dde1e6;
  --mark: #d81b5c; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1c2026; --ink: #e8eaed; --soft: #9aa3ad;
  --line: #323840; --mark: #ff6b9a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, ul, dl { max-width: 46rem; }
.lead { font-size: 1.12rem; }
.soft, figcaption, dt { color: var(--soft); }
.note { border-left: 3px solid var(--mark); padding-left: .75rem; }
.head { display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: flex-start; }
.head > div { flex: 1 1 20rem; }
.head figure { margin: 0; flex: 0 1 15rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 1rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
figure { margin: 1rem 0; }
.row figure { flex: 0 1 auto; max-width: 100%; margin: .5rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
.wide img { max-width: none; }
figcaption { font-size: .88rem; line-height: 1.4; margin-top: .35rem; max-width: 22rem; }
.row figcaption { max-width: 19rem; }
figure.alone figcaption { max-width: 46rem; }
details { border: 1px solid var(--line); border-radius: .6rem; margin: .75rem 0; background: var(--card); }
summary { cursor: pointer; padding: .7rem 1rem; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); }
details > div { padding: 0 1rem 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:last-child, td:last-child { text-align: left; white-space: normal; min-width: 12rem; }
.answers { display: flex; flex-wrap: wrap; gap: 1rem; }
.answers > div { flex: 1 1 18rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .25rem 1rem 1rem; }
.answers p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
mark { background: color-mix(in srgb, var(--mark) 25%, transparent); color: inherit; border-radius: .2rem; }
code, pre { font: .88em ui-monospace, "SFMono-Regular", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem;
  overflow-x: auto; }
@media (max-width: 34rem) { body { padding: 1rem .9rem 3rem; } h1 { font-size: 1.35rem; } .row { gap: .25rem; }
  .head { gap: .5rem; } th, td { padding: .3rem .45rem; } }
@media print { :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; }
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, .answers > div { break-inside: avoid; }
  h2, h3, summary { break-after: avoid; } .wide img { max-width: 100%; }
  details::details-content { content-visibility: visible; height: auto; } }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG file's name and content, what it shows in words, and what is written below it."""

    name: str
    content: bytes
    alt: str
    caption: str = ""

    def html(self, kind: str = "") -> str:
        data = base64.b64encode(self.content).decode()
        width, height = (int.from_bytes(self.content[at : at + 4], "big") for at in (16, 20))  # of the IHDR chunk
        size = f'width="{round(width / 1.45)}" height="{round(height / 1.45)}"'
        caption = f"<figcaption>{escape(self.caption)}</figcaption>" if self.caption else ""
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(self.alt)}" {size}>'
        image = f'<div class="wide" tabindex="0">{image}</div>' if kind == "wide" else image
        return f'<figure class="{"alone" if kind else "one"}">{image}{caption}</figure>'


def text(words: str, kind: str = "") -> str:
    """A paragraph."""
    return f'<p class="{kind}">{escape(words)}</p>' if kind else f"<p>{escape(words)}</p>"


def row(pictures: Iterable[Picture]) -> str:
    return f'<div class="row">{"".join(picture.html() for picture in pictures)}</div>'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def details(title: str, more: str, *parts: str, opened: bool = False) -> str:
    """What is folded away; printing shows it all the same."""
    head = f"<summary>{escape(title)} <span>{escape(more)}</span></summary>"
    return f"<details{' open' if opened else ''}>{head}<div>{''.join(parts)}</div></details>"


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>' for name, value in pairs)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in line)}</tr>" for line in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def document(title: str, *parts: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )
