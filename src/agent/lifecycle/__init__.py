"""What a run is to the outside: its folder and lock, its status and attempts, its environment, and what ends it early.

In come states and figures of an attempt, signals and stop files; out go ``status.json`` and the file that tells the
launcher how it ended. Start reading at ``run_folder.py``.
"""
