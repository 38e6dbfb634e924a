"""Batches on time: worker processes that read samples ahead, and the iterator that the training draws from.

In come the reader of samples and the plan of an update; out go batches in memory that the processes share, in an order that
no number of workers changes. Start reading at ``loader.py``.
"""
