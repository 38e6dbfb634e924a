"""The report of a run, or the comparison of several: one HTML page that opens offline and loads nothing.

In come run folders, also of runs that are going on; out goes the page. Start reading at ``page.py``, which lists the
sections; ``collect.py`` reads a run folder, ``charts.py`` draws, ``markup.py`` escapes and lays out.
"""
