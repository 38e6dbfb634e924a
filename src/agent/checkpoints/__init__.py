"""Checkpoints on the disk, whole or not there, and tensors by name out of them.

In come named tensors and a step; out go folders with a manifest of checksums, and, at a start, the same tensors, read while
they are verified. Start reading at ``store.py`` for the folders and at ``weights.py`` for what is loaded from elsewhere.
"""
