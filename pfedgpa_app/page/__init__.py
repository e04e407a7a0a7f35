"""One HTML page to look at a run, to compare some, or of a bench.

The figures are functions from what runs left to plotly figures, in `figures` (what every strategy
has) and `method` (what pFedGPA found, over a slider). `runs` and `bench` put them together, and
`html` makes one page of them that needs no network, server or file beside it. Whatever imports
these waits for plotly.
"""
