"""Numbers of one robot and back: statistics of states and actions, how they normalise, and actions relative to the state.

In come columns of recorded data or a checkpoint's statistics; out go a ``Normalizer`` for each robot and feature. Start
reading at ``normalizer.py``.
"""
