"""From the number of a sample to what the model reads: the order of the samples, and a sample's pictures, numbers and words.

In comes k; out go the frame that the mixture gives it and that frame as arrays, transformed and normalised. Start reading at
``mixture.py``, then ``reader.py``; ``building.py`` makes the readers of a run.
"""
