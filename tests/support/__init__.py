"""What tests share: small data sets, models and hubs, real runs of them, and what reads the results.

Start with `launching.py`, which starts a run, and `forked.py`, which starts many of them in little time.
"""
