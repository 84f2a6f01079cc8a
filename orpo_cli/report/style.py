"""How the page looks, by day and by night: colours of the series, and the style sheet, which is part of the page."""

from __future__ import annotations

from collections.abc import Sequence

COLOURS = "abcdefgh"
"""Classes of series, each of which has a colour."""
_LIGHT = ("#2468b0", "#c2571a", "#2f7d4f", "#8a4fa3", "#a8840d", "#b53a57", "#2b8a96", "#6b6b6b")
_DARK = ("#6cb0f5", "#f0975a", "#74c794", "#c795dd", "#dcbc4e", "#ee8199", "#6accd6", "#b0b0b0")


def _palette(colours: Sequence[str]) -> str:
    return "".join(f"--{letter}:{colour};" for letter, colour in zip(COLOURS, colours, strict=True))


STYLE = (
    f":root{{--ground:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5b6470;--rule:#d9dee4;--well:#2f7d4f;--ill:#b3261e;"
    f"{_palette(_LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{--ground:#14171b;--card:#1d2126;--ink:#e7eaee;--soft:#a0a9b4;"
    f"--rule:#343b44;--well:#74c794;--ill:#ff8f86;{_palette(_DARK)}}}}}"
    + "".join(f".{letter}{{--paint:var(--{letter})}}" for letter in COLOURS)
    + """
*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:24px 20px 60px}h1{font-size:1.5rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:36px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:18px 0 6px;overflow-wrap:anywhere}h4{margin:8px 0 2px;font-size:.85rem;color:var(--soft)}
.note{color:var(--soft)}.well{color:var(--well);font-weight:600}
.finding{border-left:4px solid var(--ill);background:var(--card);padding:8px 14px;margin:10px 0}.finding p{margin:2px 0}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:18px}
figure{margin:0;background:var(--card);border-radius:8px;padding:12px}figcaption{font-weight:600;margin-bottom:4px}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
path.grid{stroke:var(--rule);stroke-width:1}.axis,.zero{stroke:var(--soft);stroke-width:1;fill:none}
.zero{stroke-dasharray:2 3}.line{fill:none;stroke:var(--paint);stroke-width:1.8;stroke-linejoin:round}
.line.faint{opacity:.28;stroke-width:1}.line.dashed{stroke-dasharray:5 4;stroke-width:1.2}
.dot{fill:var(--card);stroke:var(--paint);stroke-width:2}.cloud{fill:var(--paint);opacity:.55}.bar{fill:var(--paint);opacity:.55}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem;color:var(--soft);overflow-wrap:anywhere}
.key::before{content:"";display:inline-block;width:12px;height:3px;margin-right:6px;vertical-align:middle;
background:var(--paint)}.key.line::before{width:9px;height:9px;border-radius:50%;
background:none;border:2px solid var(--paint)}.key.cloud,.key.bar{opacity:1}
.key.cloud::before,.key.bar::before{height:10px;
width:10px;opacity:.7}.key.cloud::before{border-radius:50%}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}th,td{text-align:left;padding:4px 18px 4px 0;
border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:break-word}th{font-weight:600}
td{font-variant-numeric:tabular-nums}pre{background:var(--card);padding:10px 12px;border-radius:6px;overflow-x:auto;
white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem;margin:4px 0}.sample{margin:0 0 22px}
.prompt{font-weight:600;white-space:pre-wrap;overflow-wrap:anywhere;margin:0}summary{cursor:pointer;color:var(--soft)}
"""
)
