"""The training itself: what a start builds, the loop over updates, and what it saves, validates and continues from.

In come a checked config and the processes that take part; out go weights and the exit code. Start reading at
``attempt.py``, then ``trainer.py``.
"""
