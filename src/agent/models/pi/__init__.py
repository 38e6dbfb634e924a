"""The π family of policies: π0 (https://arxiv.org/abs/2410.24164).

In come a model JSON and batches; out go losses per sample and actions, and checkpoints that LeRobot and openpi read.
Start reading at ``family.py``, which names everything that the rest of the program calls.
"""
