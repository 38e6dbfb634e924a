"""Takes a saved checkpoint to where it is used: exports it to other formats, and translates between robot and model.

In come a checkpoint's folder and observations; out go exported files and model cards, and observations as the policy reads
them. Start reading at ``saved_checkpoint.py``, then ``exporting.py``; scripts call ``agent.inference.load_policy``.
"""
