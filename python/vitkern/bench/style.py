# SPDX-License-Identifier: Apache-2.0
"""The style of a report by day and by night. The colours also suit colour-blind readers."""

_DAY = """--ink:#16202c;--muted:#5b6776;--grid:#e3e8ee;--page:#ffffff;--card:#f7f9fb;--edge:#dfe5ec;--bad:#b42318;
--c0:#0b6bcb;--c1:#d9730d;--c2:#0f8a6a;--c3:#b23a8e;--c4:#7a5af5;--plain:#8a96a5;--limit:#98a4b3"""
_NIGHT = """--ink:#e8edf3;--muted:#9aa7b6;--grid:#2a3441;--page:#10161d;--card:#18212b;--edge:#2a3541;--bad:#ff8577;
--c0:#5aaefc;--c1:#ffa552;--c2:#45cfa6;--c3:#f07cc6;--c4:#a99bff;--plain:#8492a3;--limit:#667487"""
_FONT = "ui-sans-serif,system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif"

_COLOURS = f":root{{{_DAY}}}@media (prefers-color-scheme:dark){{:root{{{_NIGHT}}}}}"

_FIGURES = "".join(
    f".fill-{name}{{fill:var(--{name})}}.line-{name}{{fill:none;stroke:var(--{name});stroke-width:2}}"
    f".ring-{name}{{fill:var(--card);stroke:var(--{name});stroke-width:2}}"
    for name in ("c0", "c1", "c2", "c3", "c4", "plain", "limit", "bad")
)

SVG = (
    _COLOURS
    + f"svg text{{font-family:{_FONT};font-size:12px;fill:var(--ink)}}"
    + "svg text.tick{fill:var(--muted);font-size:11px}svg text.head{font-weight:600;font-size:13px}"
    + ".grid{fill:none;stroke:var(--grid);stroke-width:1}.back{fill:var(--card)}"
    + ".faint{opacity:.5}.dashed{stroke-dasharray:5 4}.thin{stroke-width:1.25}"
    + ".dotted{stroke-dasharray:1.5 4;stroke-linecap:round}"
    + _FIGURES
)

PAGE = (
    SVG
    + f"""
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 {_FONT}}}
main{{max-width:1240px;margin:0 auto;padding:28px 18px 60px}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 6px}}
h2{{font-size:1.2rem;margin:40px 0 4px}}
p{{margin:0 0 12px;max-width:75ch}}
.muted,caption,footer{{color:var(--muted);font-size:.9rem}}
.alarm{{border-left:4px solid var(--bad);padding:10px 14px;background:var(--card);margin:18px 0}}
.tiles,.plots{{display:grid;gap:12px;margin:16px 0}}
.tiles{{grid-template-columns:repeat(auto-fill,minmax(180px,1fr))}}
.plots{{grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr))}}
.tile,figure{{background:var(--card);border:1px solid var(--edge);border-radius:10px;margin:0;padding:12px 14px}}
.tile b{{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}}
.tile b small{{font-size:.8rem;font-weight:400;color:var(--muted)}}
.tile span{{color:var(--muted);font-size:.85rem;overflow-wrap:anywhere}}
figure svg{{display:block;width:100%;height:auto}}
.wide{{overflow-x:auto}}
.wide svg{{min-width:520px}}
.legend{{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.88rem;margin:6px 0 0}}
.legend i{{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}}
.table{{overflow-x:auto;border:1px solid var(--edge);border-radius:10px;margin-top:12px}}
table{{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums;white-space:nowrap}}
th,td{{padding:5px 7px;text-align:right;border-bottom:1px solid var(--grid)}}
th{{background:var(--card);position:sticky;top:0;font-weight:600;white-space:normal;vertical-align:bottom}}
th:nth-child(-n+5),td:nth-child(-n+5),td.words{{text-align:left}}
tr.plain td{{color:var(--muted)}}
td.words{{color:var(--bad);white-space:normal}}
footer{{margin-top:40px}}
"""
)
