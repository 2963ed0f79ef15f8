"""`tell study`: sweeps over a grid of runs. A recipe names the cells, an executor runs each once, and tables, fits and
figures are made from the finished ones."""
