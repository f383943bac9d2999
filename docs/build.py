"""Build the documentation: every tutorial in full, and a page of the public names.

The pages go to docs/_build. A tutorial that fails, or that takes too long, fails the build.
"""

from __future__ import annotations

import html
import importlib.util
import inspect
import os
import re
import shutil
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

import ppl_toolkit as ppl

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "_build"
LIMIT = 120.0  # seconds for one tutorial

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
h2 { margin-top: 2.5rem; }
pre { overflow-x: auto; padding: .7rem; border-radius: 6px; font-size: 13.5px; line-height: 1.45;
  background: #f6f6f4; margin: .6rem 0; }
.signature { white-space: pre-wrap; } .doc, .output_area pre { background: none; }
.output_area pre { border-left: 3px solid #d8d8d4; border-radius: 0; }
.output_area .output_stderr pre { border-color: #c1440e; white-space: pre-wrap; }
.prompt, .anchor-link { display: none; }
img { max-width: 100%; }
"""


def page(title: str, body: str) -> str:
    """A self-contained page."""
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{colours}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main></body></html>\n"
    )


def opening(notebook: nbformat.NotebookNode) -> tuple[str, str]:
    """A tutorial's title, taken out of its text, and the first paragraph below it."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    title, _, first.source = first.source.partition("\n")
    return title.lstrip("# "), first.source.strip().split("\n\n")[0].replace("*", "")


def run(path: Path) -> tuple[str, str, float]:
    """Execute a tutorial in full and write its page: its title, first paragraph and seconds."""
    notebook = jupytext.read(path)
    begin = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=int(LIMIT),
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.perf_counter() - begin
    for cell in notebook.cells:  # where the kernel kept its cells' code is of no interest
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                output.text = re.sub(r"\S*ipykernel_\d+/\d+\.py:\d+: ", "", output.text)
    title, summary = opening(notebook)
    body, _ = HTMLExporter(template_name="basic", embed_images=True).from_notebook_node(notebook)
    (OUT / f"{path.stem}.html").write_text(page(title, body), encoding="utf-8")
    return title, summary, seconds


def described(name: str, value: object, level: int = 2) -> str:
    """Signature and docstring of a public name, and of a class's public methods."""
    if inspect.ismodule(value):
        names = ", ".join(f"<code>{n}</code>" for n in getattr(value, "__all__", ()))
        signature, extra = f"ppl_toolkit.{name}", f"<p>Names: {names}</p>" if names else ""
    else:
        try:
            signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", f"{name}{inspect.signature(value)}")
        except (TypeError, ValueError):
            signature = name if callable(value) else f"{name} = {value!r}"
        methods = (
            (k, v)
            for k, v in (vars(value).items() if inspect.isclass(value) else ())
            if not k.startswith("_") and inspect.isfunction(v) and v.__doc__
        )
        extra = "".join(described(f"{name}.{k}", v, level + 1) for k, v in methods)
    doc = inspect.getdoc(value) if callable(value) or inspect.ismodule(value) else ""
    return (
        f'<h{level} id="{name}">{name}</h{level}>'
        f'<pre class="signature">{html.escape(signature)}</pre>'
        + (f'<pre class="doc">{html.escape(doc)}</pre>' if doc else "")
        + extra
    )


def api() -> None:
    """Write the page of the public names."""
    names = [name for name in ppl.__all__ if not name.startswith("_")]
    links = ", ".join(f'<a href="#{name}">{name}</a>' for name in names)
    body = "".join(described(name, getattr(ppl, name)) for name in names)
    (OUT / "api.html").write_text(page("Public names", f"<p>{links}</p>{body}"), encoding="utf-8")


def main() -> int:
    """Build everything; 1 if a tutorial was too slow (one that fails raises)."""
    if importlib.util.find_spec("ipykernel") is None:
        sys.exit("the documentation needs the extra 'docs': pip install -e '.[docs]'")
    os.environ.pop("PPL_FAST", None)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # a bar needs a live notebook
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    entries, slow = [], []
    for path in sorted((ROOT / "tutorials").glob("*.py"), key=lambda p: p.stem != "quickstart"):
        title, summary, seconds = run(path)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        link = f'<a href="{path.stem}.html">{html.escape(title)}</a>'
        entries.append(f"<li>{link}<br>{html.escape(summary)}</li>")
        if seconds > LIMIT:
            slow.append(path.name)
    api()
    body = (
        f"<p>Version {ppl.__version__}. {html.escape(inspect.getdoc(ppl).splitlines()[0])}</p>"
        f"<h2>Tutorials</h2><ul>{''.join(entries)}</ul>"
        '<h2>Reference</h2><ul><li><a href="api.html">Public names</a></li></ul>'
    )
    (OUT / "index.html").write_text(page("ppl_toolkit", body), encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}/index.html")
    if slow:
        print(f"slower than {LIMIT:.0f} s: {', '.join(slow)}", file=sys.stderr)
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
