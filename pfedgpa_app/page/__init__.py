"""The HTML page of a run, of several with a comparison, or of a bench.

`figures` (of every strategy) and `method` (of pFedGPA, over a slider) turn rows into plotly
figures. `runs` and `bench` put them together, and `html` makes one page of them that needs no
network, server or other file. Importing them imports plotly.
"""
