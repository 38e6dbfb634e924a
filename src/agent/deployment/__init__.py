"""From a saved checkpoint to where it is used: an export in another format, or what a robot and the model say to each other.

In come a checkpoint's folder and observations; out go exported files and model cards, and observations as the policy reads
them. Start reading at ``saved_checkpoint.py``; ``agent.inference.load_policy`` is what scripts call.
"""
