"""What a look at config, data, weights and machine can say before a job: ``--check true``, and ``agent.prepare``.

In comes a checked config; out goes a table of rows, each with what was found and what to change, and the exit code.
Start reading at ``check.py``, which lists the checks; ``context.py`` has what they share, ``report.py`` the rows.
"""
