"""Parts that several families share: transformer layers, tables of sizes, predicted memory, names of tensors.

In come sizes and shapes; out go modules without weights, bytes and mappings of names. Nothing here imports a family.
Start reading at ``sizes.py``, then the file of the part that a family builds on.
"""
