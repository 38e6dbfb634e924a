"""The π family: π0 (https://arxiv.org/abs/2410.24164).

In come a model JSON and batches; out go losses per sample and actions, and checkpoints that LeRobot and openpi read.
Read `family.py` first: it names everything that the rest of the program asks of the family.
"""
