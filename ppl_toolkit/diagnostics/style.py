"""The look of the report page: colours for light and dark, the style sheet, the script.

Text keeps a contrast of 4.5 with what lies behind it, and the lines of pictures one of 3 (WCAG 2,
level AA), in both themes; a test computes these from the colours here.
"""

from __future__ import annotations

__all__ = ["CHAIN_COLOURS", "DARK", "LIGHT", "SCRIPT", "style_sheet"]

LIGHT = {
    "paper": "#ffffff",
    "soft": "#f3f5f7",
    "ink": "#1b1f24",
    "mute": "#565e68",
    "rule": "#d5dae0",
    "link": "#0b57a8",
    "good": "#14663a",
    "good-back": "#e8f5ec",
    "mild": "#7a4b00",
    "mild-back": "#fdf3dd",
    "bad": "#a3161f",
    "bad-back": "#fdeceb",
    "c0": "#1f6fb5",
    "c1": "#c2480f",
    "c2": "#1c7d47",
    "c3": "#8b45a6",
    "c4": "#0d7680",
    "c5": "#8a6200",
    "plain": "#5d6672",
}
DARK = {
    "paper": "#14171a",
    "soft": "#1e2328",
    "ink": "#e8ebee",
    "mute": "#a9b2bc",
    "rule": "#3a4149",
    "link": "#84bdff",
    "good": "#86d9a3",
    "good-back": "#16301f",
    "mild": "#f1c772",
    "mild-back": "#332811",
    "bad": "#ff9d98",
    "bad-back": "#3a1a1b",
    "c0": "#6cb2f5",
    "c1": "#ff9a66",
    "c2": "#76cf95",
    "c3": "#cf9be8",
    "c4": "#62cdd6",
    "c5": "#e0b84f",
    "plain": "#98a2ae",
}
CHAIN_COLOURS = 6


def _variables(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.items())


_RULES = """
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
header,main,footer{max-width:73rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .2rem;letter-spacing:-.01em}
h2{font-size:1.3rem;margin:3rem 0 .5rem;padding-top:.6rem;border-top:2px solid var(--rule)}
h3{font-size:1.05rem;margin:1.8rem 0 .4rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--link)}
a:focus-visible,button:focus-visible,input:focus-visible,summary:focus-visible,
[tabindex]:focus-visible{outline:3px solid var(--link);outline-offset:2px}
:target{outline:2px solid var(--link);outline-offset:4px}
.mute,figcaption span{color:var(--mute)}
.small{font-size:.875rem}
code,pre{font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--soft);padding:.8rem 1rem;border-radius:6px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:.5rem 0}
pre.code{white-space:pre;overflow:auto}
nav ul{list-style:none;margin:.8rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem 1.1rem}
nav a{display:inline-block;padding:.3rem 0}
.verdict{margin:1.2rem 0 0;padding:.9rem 1.1rem;border-left:6px solid var(--tone);
background:var(--back);border-radius:4px}
.verdict>p:first-child{font-size:1.15rem;font-weight:650;color:var(--tone);margin:0}
.verdict ul{margin:.6rem 0 0;padding:0;list-style:none}
.verdict li{padding:.55rem 0;max-width:58rem}
.verdict li+li{border-top:1px solid var(--rule)}
.fine{--tone:var(--good);--back:var(--good-back)}
.warning{--tone:var(--mild);--back:var(--mild-back)}
.error{--tone:var(--bad);--back:var(--bad-back)}
.tag{font-weight:650;color:var(--tone)}
.advice{display:block;margin-top:.15rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:0 2.2rem;align-items:start}
.facts>*{min-width:0}
dl{display:grid;grid-template-columns:minmax(7.5rem,max-content) 1fr;gap:.2rem .9rem;margin:.4rem 0}
dt{color:var(--mute)}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.numbers{display:flex;flex-wrap:wrap;gap:.6rem 2.4rem;margin:.9rem 0}
.numbers div{min-width:7rem}
.numbers b{display:block;font-size:1.35rem;font-weight:600;line-height:1.25;
font-variant-numeric:tabular-nums}
.split{display:flex;height:.8rem;max-width:46rem;border-radius:3px;overflow:hidden;gap:2px;
margin:.9rem 0 .3rem}
.split i{background:var(--c);min-width:2px}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;background:var(--c);
margin-right:.35rem}
.keys{display:flex;flex-wrap:wrap;gap:.1rem 1.3rem;font-size:.875rem;margin:.3rem 0}
.keys svg{width:1.9rem;height:.7rem;vertical-align:middle;margin-right:.3rem}
.wide{overflow:auto;position:relative;border:1px solid var(--rule);border-radius:6px;margin:.6rem 0;
max-height:38rem;max-width:100%}
.fit{width:fit-content}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
.fit table{width:auto}
th,td{overflow-wrap:normal;padding:.32rem .65rem;text-align:right;white-space:nowrap}
thead th{background:var(--soft);position:sticky;top:0;z-index:2;font-weight:600;
vertical-align:bottom;white-space:normal;line-height:1.25}
tbody th{font-weight:500;position:sticky;left:0;background:var(--paper);z-index:1}
tbody th,thead th:first-child,td.word,th.word{text-align:left}
tbody th{max-width:15rem;overflow:hidden;text-overflow:ellipsis}
thead th:first-child{left:0;z-index:3}
tbody tr+tr>*{border-top:1px solid var(--rule)}
td.fails{color:var(--bad);font-weight:650;background:var(--bad-back)}
th button{all:unset;cursor:pointer;display:block;width:100%}
th button::after{content:"\\A0↕";color:var(--mute)}
th[aria-sort=ascending] button::after{content:"\\A0↑";color:inherit}
th[aria-sort=descending] button::after{content:"\\A0↓";color:inherit}
.find{display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:center;margin:.7rem 0 0}
.find label{display:flex;gap:.5rem;align-items:center}
.find input{font:inherit;padding:.35rem .6rem;border:1px solid var(--mute);border-radius:4px;
background:var(--paper);color:var(--ink);width:18rem;max-width:100%}
.glyph{display:block;position:relative;width:5rem;height:.9rem}
.glyph i,.glyph b{position:absolute;background:var(--c0)}
.glyph i{height:3px;top:calc(50% - 1.5px);min-width:2px}
.glyph b{width:3px;height:.7rem;top:calc(50% - .35rem);margin-left:-1.5px}
.level{display:block;height:3px;margin-top:1px;background:var(--c0);margin-left:auto}
.panels{display:grid;gap:1.1rem 1.4rem;margin:.8rem 0;
grid-template-columns:repeat(auto-fill,minmax(min(100%,15.6rem),1fr))}
figure{margin:0;min-width:0;display:flex;flex-direction:column}
figcaption{font-size:.875rem;line-height:1.35;margin-bottom:.25rem}
figcaption b{font-weight:600;display:block}
figure svg{display:block;overflow:hidden;width:100%;max-width:26rem;height:auto;margin-top:auto}
.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
.two svg{max-width:30rem}
.top svg{margin-top:0}
section>ul{max-width:58rem}
details{margin:.3rem 0}
summary{cursor:pointer;padding:.35rem 0;font-weight:600}
svg text{font:11px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--mute);
text-anchor:middle}
svg path{fill:none;stroke-linejoin:round}
svg .axis{stroke:var(--mute)}
svg .grid{stroke:var(--rule);stroke-width:.7}
svg .line{stroke:var(--c);stroke-width:1.3}
svg .thin{stroke-width:.7}
svg .bold{stroke-width:2.2}
svg .thick{stroke-width:3.6}
svg .veil{stroke-opacity:.55}
svg .ref{--c:var(--ink);stroke-dasharray:5 3;stroke-width:1}
svg .fill{fill:var(--c);fill-opacity:.28}
svg .solid{fill:var(--c);fill-opacity:.75}
svg .dots{stroke:var(--c);stroke-linecap:round;stroke-width:2.4}
svg .big{stroke-width:5.5}
svg.graph{display:block;width:auto;max-width:none;height:auto}
.plate{padding:.6rem}
svg .node{fill:var(--paper);stroke:var(--c0);stroke-width:1.3}
svg .node.seen{fill:var(--soft);stroke:var(--ink)}
svg .node.dash1,svg .node.dash2{stroke:var(--mute)}
svg .name{fill:var(--ink);font-weight:600}
svg .mute-line{--c:var(--plain)}
svg .head{fill:var(--plain)}
.bad{--c:var(--bad)}.ink{--c:var(--ink)}.plain{--c:var(--plain)}
.dash1{stroke-dasharray:6 2}.dash2{stroke-dasharray:2 2}.dash3{stroke-dasharray:8 2 2 2}
.dash4{stroke-dasharray:4 4}.dash5{stroke-dasharray:1 3}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;background:var(--paper);padding:.3rem .6rem;z-index:9}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
footer{margin-top:3rem;padding-bottom:3rem;font-size:.875rem;color:var(--mute)}
@media (max-width:40rem){body{font-size:15px}h1{font-size:1.4rem}
header,main,footer{padding-left:.75rem;padding-right:.75rem}
th,td{padding:.3rem .5rem}tbody th{max-width:9.5rem}.verdict{padding:.8rem}}
@media print{body{font-size:10.5pt}nav,.find,.skip{display:none}
.wide{overflow:visible;max-height:none;border:0}pre.code{white-space:pre-wrap}table{font-size:8pt}
svg.graph{max-width:100%}
thead th,tbody th{position:static}th button::after{content:""}
figure,tr,li{break-inside:avoid}h2,h3{break-after:avoid}
.panels{grid-template-columns:repeat(4,1fr);gap:.7rem}.two{grid-template-columns:repeat(2,1fr)}
details::details-content{content-visibility:visible;block-size:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def style_sheet() -> str:
    """The style sheet; print is always light."""
    chains = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(CHAIN_COLOURS))
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"{_RULES}{chains}"
    )


# Tables marked data-sort sort by a click on a heading, and get a field to search in. Without
# the script they are plain tables. A fragment such as #sort=r_hat, #sort=-ess_bulk or #find=theta
# (or both, joined by &) does the same on opening.
SCRIPT = """
document.querySelectorAll("table[data-sort]").forEach(function (table) {
  var body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
  var rows = Array.from(body.rows), shown;
  function value(row, i) {
    var cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : parseFloat(cell.dataset.v);
  }
  function sort(i, down) {
    var sign = down ? -1 : 1;
    var keyed = rows.map(function (row, at) { return [value(row, i), at, row]; });
    keyed.sort(function (a, b) {
      var p = a[0], q = b[0];
      if (typeof p === "string") return sign * p.localeCompare(q, "en", {numeric: true});
      if (isNaN(p) || isNaN(q)) return isNaN(p) - isNaN(q) || a[1] - b[1];
      return sign * (p - q) || a[1] - b[1];
    });
    keyed.forEach(function (k) { body.appendChild(k[2]); });
    heads.forEach(function (head, j) {
      if (j === i) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }
  heads.forEach(function (head, i) {
    if (!head.dataset.key) return;
    var button = document.createElement("button");
    button.type = "button";
    while (head.firstChild) button.appendChild(head.firstChild);
    head.appendChild(button);
    button.addEventListener("click", function () {
      sort(i, head.getAttribute("aria-sort") === "ascending");
    });
  });
  var form = document.createElement("div"), label = document.createElement("label");
  var field = document.createElement("input");
  form.className = "find";
  field.type = "search";
  label.append("Find ", field);
  shown = document.createElement("span");
  shown.className = "mute small";
  shown.setAttribute("role", "status");
  form.append(label, shown);
  table.parentNode.before(form);
  function find() {
    var word = field.value.trim().toLowerCase(), count = 0;
    rows.forEach(function (row) {
      var fits = row.cells[0].textContent.toLowerCase().includes(word);
      row.hidden = !fits;
      count += fits;
    });
    shown.textContent = count + " of " + rows.length + " rows";
  }
  field.addEventListener("input", find);
  new URLSearchParams(location.hash.slice(1)).forEach(function (wanted, what) {
    var down = wanted[0] === "-", key = down ? wanted.slice(1) : wanted;
    var i = heads.findIndex(function (head) { return head.dataset.key === key; });
    if (what === "sort" && i >= 0) sort(i, down);
    if (what === "find") field.value = wanted;
  });
  find();
});
"""
