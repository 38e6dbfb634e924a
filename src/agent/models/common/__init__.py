"""Parts that several families share: transformer layers, tables of sizes, predicted memory, names of tensors.

Nothing here knows a family. Read `sizes.py` for the tables, then the file of the part that a family builds on.
"""
