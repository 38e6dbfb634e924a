"""Policies in simulation: Meta-World through LeRobot's environment classes, in closed loop. Needs the extra ``sim``.

In come a checkpoint, or a run whose checkpoints are awaited, and tasks; out go success rates with intervals, and films.
Start reading at ``session.py``; ``evaluation.py`` evaluates one checkpoint, ``rollout.py`` plays one episode.
"""
