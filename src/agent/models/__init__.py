"""The policies: the interface of every type, the registry of types, layers that they share, and a folder for each family.

In come a model JSON, batches and published tensors; out go losses, actions and the contents of checkpoints. Start reading
at ``family.py``, which defines the interface; ``registry.py`` lists the types, ``policy.py`` is the network's base class.
"""
