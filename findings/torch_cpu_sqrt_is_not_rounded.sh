#!/usr/bin/env bash
# torch.sqrt of a float32 tensor on a CPU is off by the last bit in 1 of 160 numbers; NumPy's and a compiled torch.sqrt are exact.
#
# Guess: a root is the nearest float32 to the exact one, because IEEE 754 asks for it and every processor has such an instruction.
# So CPU and GPU, eager and compiled, agree to the bit, at least where nothing but a root is computed. Found: torch's operator on x86
# takes the root from MKL's vector library, which does not round it correctly, for one number as for a million, in sqrt, pow(0.5) and
# _foreach_sqrt. torch.compile's C++ uses the instruction, so that compiling a function changes its roots. An optimizer that divides
# by a root, as Adam does, gives other bits on a CPU than the same formula elsewhere. Roots of whole squares are exact.
#
# Seen (torch 2.11.0, numpy 2.2.6, Python 3.12, x86-64 with AVX-512, MKL of torch's wheel):
#   torch.sqrt: 6659 of 1048576 differ from the nearest float32, by 1 unit in the last place at most; one by one the same numbers
#   pow(0.5): 6659, _foreach_sqrt: 6659; numpy.sqrt: 0; torch.div: 0
#
# Needs uv and a Python 3.12. Fails if torch's behaviour changes.
set -euo pipefail
packages=(--with 'torch==2.11.0' --with 'numpy==2.2.6')
uv run --quiet --isolated --no-project --python 3.12 "${packages[@]}" python - <<'PY'
import numpy as np
import torch

numbers = np.random.default_rng(0).random(1 << 20, dtype=np.float32)
given = torch.from_numpy(numbers)
# The root in float64 rounded to float32 is the nearest one: float64 has more than twice the digits.
nearest = np.sqrt(numbers.astype(np.float64)).astype(np.float32)
roots = torch.sqrt(given).numpy()
wrong = {
    "torch.sqrt": roots != nearest,
    "pow(0.5)": given.pow(0.5).numpy() != nearest,
    "_foreach_sqrt": torch._foreach_sqrt([given])[0].numpy() != nearest,
    "numpy.sqrt": np.sqrt(numbers) != nearest,
    "torch.div": (given / given.flip(0)).numpy() != numbers / numbers[::-1],
}
last_places = np.abs(roots.view(np.int32) - nearest.view(np.int32)).max()
print(f"{', '.join(f'{name}: {some.sum()}' for name, some in wrong.items())} of {len(numbers)}; at most {last_places} ulp")
single = np.array([torch.sqrt(given[i : i + 1]).item() for i in np.flatnonzero(wrong["torch.sqrt"])[:1000]], np.float32)
print(f"one by one: {(single != nearest[wrong['torch.sqrt']][:1000]).sum()} of the first 1000 of these are off too")
assert wrong["torch.sqrt"].mean() > 1e-3 and last_places == 1, "torch's roots are exact now"
assert not wrong["numpy.sqrt"].any() and not wrong["torch.div"].any()
PY
