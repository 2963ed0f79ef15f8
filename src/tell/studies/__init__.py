"""Studies: grids of runs from a recipe, made once each, read back into tables, fits and figures.

`study/` is one run, from file to report; a study is many of them.
"""
