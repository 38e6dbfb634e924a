#!/usr/bin/env bash
# Importing torchcodec 0.11.1's decoder imports torch's compiler front end, for three quarters of the time that torch takes.
#
# Guess: `from torchcodec.decoders import VideoDecoder` adds a thin binding to an imported torch, some tens of milliseconds. Found:
# it imports torch._dynamo and sympy too, some nine hundred modules. Each process that
# decodes, a data worker that was spawned for instance, pays for it, though nothing is compiled.
#
# Seen (torchcodec 0.11.1, torch 2.11.0, Python 3.12, two CPU cores):
#   import torch: 1077 modules, 2.6 s, no torch._dynamo; then torchcodec.decoders: 903 modules more, 1.9 s, torch._dynamo and sympy
#   again: 1.8 s, then 1.5 s
#
# Needs uv, a Python 3.12 and FFmpeg's libraries (Debian's package ffmpeg). Fails if torchcodec's behaviour changes.
set -euo pipefail
packages=(--with 'torchcodec==0.11.1' --with 'torch==2.11.0' --with 'numpy==2.2.6')
uv run --quiet --isolated --no-project --python 3.12 "${packages[@]}" python - <<'PY'
import sys
import time

begin = time.perf_counter()
import torch  # noqa: E402, F401

middle, before = time.perf_counter(), set(sys.modules)
import torchcodec.decoders  # noqa: E402, F401

end, more = time.perf_counter(), set(sys.modules) - before
print(f"import torch: {len(before)} modules, {middle - begin:.1f} s; torch._dynamo {'torch._dynamo' in before}")
print(
    f"then torchcodec.decoders: {len(more)} modules more, {end - middle:.1f} s, {(end - middle) / (middle - begin):.2f} of "
    f"torch's; torch._dynamo {'torch._dynamo' in more}, sympy {'sympy' in more}"
)
assert not {"torch._dynamo", "sympy"} & before, "torch brings them by itself"
assert {"torch._dynamo", "sympy"} <= more, "torchcodec no longer imports torch's compiler"
PY
