"""The steps of the acceptance on a GPU, one module each with a function ``run``; `benchmarks/gpu.py` starts them."""
