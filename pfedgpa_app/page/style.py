"""The page's style sheet; Flower packs Python files only, so it is a string."""

STYLE = """
:root { --soft: #f4f6f8; --line: #d9dee4; --quiet: #56616d; --accent: #1f6cab; --marked: #fff4d6; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #ffffff; color: #1b2229;
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .8rem; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 0 0 .15rem; }
p { margin: 0 0 .6rem; }
.note { background: var(--marked); border-radius: .5rem; padding: .6rem .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.quiet, figcaption { color: var(--quiet); }
figcaption { font-size: .92rem; margin-bottom: .4rem; max-width: 80ch; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; padding: 0; }
.numbers div { background: var(--soft); border-radius: .5rem; padding: .6rem .9rem; }
.numbers dt { font-size: .85rem; color: var(--quiet); }
.numbers dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem;
  margin: .8rem 0; }
.card { border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1rem; margin: 0; min-width: 0; }
.wide { grid-column: 1 / -1; }
.plot { width: 100%; }
.table { overflow-x: auto; max-height: 32rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; }
/* Reasons of failures, which may be one long word. */
td:nth-child(3):last-child { overflow-wrap: anywhere; min-width: 8rem; }
tr.marked td { background: var(--marked); }
code { font-size: .9em; }
button { font: inherit; color: inherit; background: var(--soft); cursor: pointer;
  border: 1px solid var(--line); border-radius: .4rem; padding: .3rem .8rem; }
.save { font-size: .85rem; padding: .1rem .6rem; }
.rounds { position: sticky; top: 0; z-index: 5; display: flex; align-items: center; gap: .8rem;
  background: #ffffff; border-bottom: 1px solid var(--line); padding: .6rem 0;
  margin-bottom: 1rem; }
.rounds label { white-space: nowrap; min-width: 8.5rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.rounds input { flex: 1; min-width: 0; height: 1.6rem; accent-color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
summary { cursor: pointer; padding: .3rem 0; }
.section > summary { font-size: 1.05rem; font-weight: 600; }
@media (max-width: 900px) { .figures { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) {
  main { padding: 1rem .7rem 3rem; }
  .card { padding: .7rem .5rem; }
  h1 { font-size: 1.35rem; }
}
@media print { .rounds, button { display: none; } }
"""
