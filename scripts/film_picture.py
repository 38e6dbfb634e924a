"""Shows films of agent.evaluate_sim side by side in one small animated picture, for a page that plays no mp4.

uv run python scripts/film_picture.py docs/demo_film.gif FILM.mp4 FILM.mp4 …
"""

import sys
from pathlib import Path

import av
from PIL import Image

EVERY = 3  # frames of the films, which have 80 a second
DURATION_MS = 80  # of a picture: about half as fast as it was
SIDE = 160  # pixels of a film


def main(target: Path, films: list[Path]) -> None:
    """A film that has ended shows its last frame until all have, and one second more."""
    columns = []
    for film in films:
        with av.open(str(film)) as container:
            frames = [
                frame.to_image().resize((SIDE, SIDE), Image.Resampling.BOX) for frame in container.decode(video=0)
            ]
        columns.append(frames[::EVERY] + frames[-1:])
    pictures = []
    for number in range(max(map(len, columns))):
        picture = Image.new("RGB", (SIDE * len(columns), SIDE))
        for place, frames in enumerate(columns):
            picture.paste(frames[min(number, len(frames) - 1)], (SIDE * place, 0))
        pictures.append(picture)
    palette = pictures[0].quantize(48, dither=Image.Dither.NONE)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [DURATION_MS] * (len(pictures) - 1) + [1000]
    pictures[0].save(target, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), list(map(Path, sys.argv[2:])))
