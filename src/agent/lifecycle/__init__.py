"""What a run is to the outside: its folder and lock, its status and attempts, what it runs on, and who ends it when it hangs.

In come states and figures of an attempt; out go ``status.json`` and the file that tells the launcher how it ended. Start
reading at ``run_folder.py``.
"""
