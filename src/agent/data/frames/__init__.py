"""Frame stores: pictures of a data set decoded once, in the size of the model, for fast reading.

In come a data set and a size; out goes a folder of Arrow files with a manifest, and at a start a ``FrameStore`` that reads
pictures out of it. Start reading at ``store.py``, for the making of a store at ``making.py``.
"""
