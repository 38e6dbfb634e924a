"""Other formats become LeRobot v3: Open X-Embodiment's RLDS trees, read without TensorFlow.

In come a tree and which of its features are what; out goes a data set. The commands are ``agent.data.from_rlds`` and
``agent.data.from_v20``; start reading at ``rlds.py``.
"""
