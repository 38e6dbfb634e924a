"""The optimizer's side of an update: from gradients to new weights.

In come a policy whose gradients are complete and the number of the update; out go updated parameters, their moments as
named tensors for a checkpoint, and a moving average of the weights. Start reading at ``optimizer.py``.
"""
