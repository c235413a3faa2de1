"""How the page looks, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #17202c; --muted: #667085; --rule: #e3e7ed;
  --train: #7d8aa0; --good: #127a4b; --warn: #b25e09; --bad: #c4242b; --accent: #2c62c9;
  --r0: #2c62c9; --r1: #d0630b; --r2: #0d8a6a; --r3: #b5338a; --r4: #7a5bd0; --r5: #8a6d14;
  --d0: #f0b429; --d1: #e8913a; --d2: #db6f52; --d3: #c4546e; --d4: #a5428a; --d5: #80389c;
  --d6: #5a349f; --d7: #2f2f8f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f141b; --card: #171e28; --ink: #e8edf4; --muted: #94a1b5; --rule: #2a3443;
    --train: #8694ab; --good: #3ecf8e; --warn: #f5a54a; --bad: #ff7b7b; --accent: #7aa5ff;
    --r0: #7aa5ff; --r1: #ff9d52; --r2: #3fd0a6; --r3: #f07fc6; --r4: #b49cff; --r5: #d8b94a;
    --d0: #7a3fb0; --d1: #9a48ac; --d2: #b9529f; --d3: #d4608d; --d4: #e87577; --d5: #f49066;
    --d6: #fbb061; --d7: #fcd46c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 60px; }
header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: baseline;
  margin-bottom: 18px; }
h1 { font-size: 27px; letter-spacing: -.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 38px 0 12px; }
h3 { font-size: 14px; margin: 20px 0 6px; color: var(--muted); font-weight: 600; }
.sub { color: var(--muted); width: 100%; margin: 0; font-size: 13.5px; overflow-wrap: anywhere; }
.badge { font-size: 13px; font-weight: 600; padding: 2px 11px; border-radius: 99px;
  border: 1.5px solid currentColor; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; }
.tile, figure, .scroll, .events, .bars, .timeline-card { background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 16px; display: flex; flex-direction: column; }
.tile span { color: var(--muted); font-size: 12.5px; }
.tile b { font-size: 23px; font-weight: 650; letter-spacing: -.01em; line-height: 1.3;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.tile small { color: var(--muted); font-size: 12px; }
.events { margin: 0; padding: 10px 14px 10px 32px; }
.events li { margin: 2px 0; overflow-wrap: anywhere; }
.events li::marker { content: "●  "; font-size: 11px; color: var(--muted); }
.events li.bad::marker { color: var(--bad); } .events li.warn::marker { color: var(--warn); }
.quiet { color: var(--muted); margin: 6px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 14px 14px 6px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline;
  padding: 0 4px 8px; }
figcaption .note { color: var(--muted); font-size: 13px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; width: 100%; font-size: 13px; }
.key { display: inline-flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.key i { width: 18px; flex: none; border-top: 3px solid currentColor; border-radius: 2px; }
.key i.dashes { border-top-style: dashed; }
svg { display: block; width: 100%; height: auto; font-size: 11.5px; }
svg text { fill: var(--ink); }
svg .tick, svg .label { fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .strong { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--card);
  stroke-width: 4px; stroke-linejoin: round; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--muted); }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1; opacity: .42; } svg .dashed { stroke-dasharray: 6 5; }
svg .mark { stroke-width: 1.2; stroke-dasharray: 2 4; }
svg .cross { fill: var(--bad); text-anchor: middle; font-size: 15px; font-weight: 700; }
svg .hit { fill: transparent; } svg .shown { visibility: hidden; pointer-events: none; }
svg .point:hover .shown { visibility: visible; }
svg .rule { stroke: var(--muted); } svg .box { fill: var(--card); stroke: var(--muted); }
.scroll { overflow-x: auto; } .grid + .scroll { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 7px 13px; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: grid; grid-template-columns: 130px 1fr 62px 110px; gap: 12px; align-items: center;
  padding: 3px 4px; font-size: 14px; }
.bar i { background: var(--rule); border-radius: 4px; height: 13px; display: block; }
.bar i b { display: block; height: 100%; border-radius: 4px; background: var(--accent); }
.bar em { font-style: normal; text-align: right; font-variant-numeric: tabular-nums; }
.bar + .grid { margin-top: 14px; }
.bar small { color: var(--muted); } .bar span { overflow-wrap: anywhere; }
.timeline { position: relative; height: 34px; border-radius: 8px; background: var(--rule);
  overflow: hidden; }
.timeline span { position: absolute; top: 0; bottom: 0; color: #fff; font-size: 12px;
  line-height: 34px; padding: 0 8px; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; border-right: 2px solid var(--paper); }
.timeline .good { background: #14804f; } .timeline .warn { background: #a8580a; }
.timeline .bad { background: #b92a30; }
.timeline .unknown {
  background: repeating-linear-gradient(45deg, #67738a 0 9px, #576279 9px 18px); }
.ends { display: flex; justify-content: space-between; color: var(--muted); font-size: 12.5px;
  margin: 4px 2px 14px; }
.sample { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 0;
  padding: 10px 14px; display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: 8px 14px; align-content: start; min-width: 0; }
.grid:has(> .sample) {
  grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.sample dt { color: var(--muted); font: 12.5px/1.5 system-ui, "DejaVu Sans", sans-serif; }
.sample dd { margin: 0; min-width: 0; } .sample b { color: var(--accent); }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
details { margin-top: 14px; } summary { cursor: pointer; color: var(--accent); padding: 6px 0; }
footer { color: var(--muted); font-size: 12.5px; margin-top: 40px; }
@media (max-width: 560px) {
  .bar { grid-template-columns: 90px 1fr 54px; } .bar small { display: none; } }
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } }
"""
