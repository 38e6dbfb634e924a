"""A data set as it was recorded: LeRobot v3's metadata, columns and videos as they lie on the disk.

In come a data set's folder and the episodes that are wanted; out go checked metadata, columns as arrays and pictures by
episode and frame, or an error that names the file and the key. Start reading at ``metadata.py``.
"""
