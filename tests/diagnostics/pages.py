"""Results made of arrays, and what every report page must keep to."""

import re
from html.parser import HTMLParser

import numpy as np
import xarray


def made(values, stats=None, attrs=None, group="posterior", **groups):
    """A result from arrays (chain, draw, ...) by site."""

    def dataset(arrays):
        return xarray.Dataset(
            {
                name: (("chain", "draw", *(f"{name}_dim_{i}" for i in range(np.ndim(x) - 2))), x)
                for name, x in arrays.items()
            }
        )

    tree = {group: dataset(values)}
    if stats:
        tree["sample_stats"] = dataset(stats)
    for name, arrays in groups.items():
        tree[name] = arrays if isinstance(arrays, xarray.Dataset) else dataset(arrays)
    tree = xarray.DataTree.from_dict(tree)
    tree.attrs.update(attrs or {})
    return tree


VOID = {"meta", "br", "input", "hr", "img", "link"}


class Document(HTMLParser):
    """Checks that tags are balanced, and collects what the checks need."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.hrefs, self.tags, self.labelled = [], [], [], [], []
        self.cells, self.row, self.in_table = [], None, False
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}: {names}"
        at = dict(attrs)
        self.tags.append((tag, at))
        if "id" in at:
            self.ids.append(at["id"])
        if "href" in at:
            self.hrefs.append(at["href"])
        self.labelled += at.get("aria-labelledby", "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"


def check(text):
    document = Document(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(document.ids) == len(set(document.ids))
    for href in document.hrefs:
        assert href.startswith(("#", "data:")), href
        if href.startswith("#"):
            assert href[1:] in document.ids, href
    assert set(document.labelled) <= set(document.ids)
    for tag, at in document.tags:
        assert "src" not in at, tag
        assert not any(name.startswith("on") for name in at), tag
        if tag == "svg":
            assert at["role"] == "img"
            assert at["aria-label"].strip()
    without_data = re.sub(r'href="data:[^"]*"', "", text)
    for word in ("http:", "https:", "src=", "@import", "url(", "fetch(", "XMLHttpRequest"):
        assert word not in without_data, word
    assert not re.search(r"[ \"(LMHV]nan\b", "".join(re.findall(r' d="[^"]*"', text)))
    return document
