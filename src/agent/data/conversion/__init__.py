"""Makes LeRobot v3 data sets of other formats: Open X-Embodiment's RLDS trees, read without TensorFlow, and LeRobot v2.0.

In come a tree and which of its features are what; out goes a data set. The commands are ``agent.data.from_rlds`` and
``agent.data.from_v20``; start reading at ``converting.py``.
"""
