"""How well a policy predicts recorded actions: the measurement, the record of it on the disk, and its picture.

In come a policy and the samples that were held out; out go ``validation/step_….json`` and its picture. Start reading at
``measurement.py``. When a training validates is decided in ``training/validating.py``.
"""
