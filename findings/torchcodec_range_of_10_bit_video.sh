#!/usr/bin/env bash
# torchcodec 0.11.1 follows the colour range that a 10-bit video states only where the width is no multiple of 32.
#
# Guess: a decoder follows the stated range (full: 0 to 1023, limited: 64 to 940) or ignores it, the same at every size. Found: a
# 10-bit full-range video is decoded as full range at widths of 80, 100, 424 and 848 and as limited range at 64, 320, 640 and
# 1280, where colours come out up to 13 levels of 255 stronger and the ends are cut off. Two cameras of one recorder, 640 and 848
# wide, are seen in different colours. Videos of 8 bits follow the range at each width.
#
# Seen (torchcodec 0.11.1 with FFmpeg 5.1.9, av 15.1.0 as the writer, Python 3.12), one field of colour, stated as full range:
#   8 bits:  width 64 (189, 49, 48), 80 (189, 49, 48), 640 (189, 49, 48), 848 (189, 49, 48)
#   10 bits: width 64 (198, 40, 39), 80 (190, 51, 50), 640 (198, 40, 39), 848 (190, 51, 50)
#
# Needs uv, a Python 3.12 and FFmpeg's libraries (Debian's package ffmpeg). Fails if torchcodec's behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=(--with 'torchcodec==0.11.1' --with 'torch==2.11.0' --with 'av==15.1.0' --with 'numpy==2.2.6')
uv run --quiet --isolated --no-project --python 3.12 "${packages[@]}" python - "$work" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np
from torchcodec.decoders import VideoDecoder

FULL = 2


def seen(width, pixels):
    path = f"{sys.argv[1]}/{pixels}_{width}.mp4"
    picture = np.full((64, width, 3), (200, 40, 40), np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", 10, options={"crf": "1", "x264-params": "log-level=error"})
        stream.width, stream.height, stream.pix_fmt, stream.time_base = width, 64, pixels, Fraction(1, 10)
        stream.codec_context.color_range = FULL
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return tuple(VideoDecoder(path, dimension_order="NHWC")[0].numpy()[32, width // 2].tolist())


found = {pixels: {width: seen(width, pixels) for width in (64, 80, 640, 848)} for pixels in ("yuv420p", "yuv420p10le")}
for pixels, by_width in found.items():
    print(pixels, "stated as full range:", ", ".join(f"width {width} {colour}" for width, colour in by_width.items()))
assert len(set(found["yuv420p"].values())) == 1, "8 bits were the same at every width"
deep = found["yuv420p10le"]
assert deep[64] == deep[640] != deep[80] == deep[848], "10 bits no longer depend on the width"
PY
