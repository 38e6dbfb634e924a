"""From the data sets of a config to batches of the model.

In come the keys under ``data`` and what the model asks of a sample; out go checked sources, normalised robots, readers of
samples and batches. Start reading at ``build.py``, which names the steps in their order.
"""
