"""Drawn calibration images: coloured shapes on a plain background, each with a caption that is true of it.

Deterministic by index, so nothing is shipped. Indices below TRAINING_BASE are calibration data that the bundled model
never saw; its training draws from TRAINING_BASE on.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

SIDE: Final = 64  # pixels; 4 x 4 patches, which merge into 4 tokens
PATCH: Final = 16  # pixels along a patch
MERGE: Final = 2  # patches merged along each side
TEMPORAL: Final = 2  # an image counts as two equal frames
TRAINING_BASE: Final = 1_000_000

COLOURS: Final = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 200, 30),
    "purple": (130, 60, 170),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
BACKGROUNDS: Final = {"grey": (128, 128, 128), "pink": (240, 170, 190), "brown": (110, 75, 45)}
SHAPES: Final = ("circle", "square", "triangle", "cross", "ring")
# Centres of both shapes where the first is `left of` the second and so on, in parts of the side: (column, row).
PLACES: Final = {
    "left of": ((0.27, 0.5), (0.73, 0.5)),
    "right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image of two shapes, and a caption that describes it."""

    pixels: Pixels  # [SIDE, SIDE, 3]
    caption: str
    colours: tuple[str, ...]  # of the first shape and of the second: different ones
    shapes: tuple[str, ...]  # may be equal
    relation: str  # of PLACES: where the first lies, seen from the second
    background: str

    @property
    def things(self) -> tuple[str, ...]:
        """Both shapes by colour: "red circle"."""
        return tuple(f"{colour} {shape}" for colour, shape in zip(self.colours, self.shapes, strict=True))


def scene(index: int) -> Scene:
    """The scene of an index, equal on every machine."""
    random = np.random.Generator(np.random.PCG64(index))
    background = list(BACKGROUNDS)[random.integers(len(BACKGROUNDS))]
    colours = [list(COLOURS)[i] for i in random.permutation(len(COLOURS))[:2]]
    shapes = [SHAPES[i] for i in random.integers(len(SHAPES), size=2)]
    relation = list(PLACES)[random.integers(len(PLACES))]
    pixels = np.full((SIDE, SIDE, 3), BACKGROUNDS[background], dtype=np.uint8)
    jitter = random.integers(-3, 4, size=(2, 2))
    radii = random.integers(9, 13, size=2)
    for i in range(2):
        column, row = (round(place * SIDE) + int(jitter[i, axis]) for axis, place in enumerate(PLACES[relation][i]))
        pixels[_mask(shapes[i], column, row, int(radii[i]))] = COLOURS[colours[i]]
    things = [f"{with_article(colour)} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    return Scene(
        pixels=pixels,
        caption=f"{things[0]} {relation} {things[1]} on {with_article(background)} background",
        colours=tuple(colours),
        shapes=tuple(shapes),
        relation=relation,
        background=background,
    )


def with_article(words: str) -> str:
    """The words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def patches(pixels: Pixels) -> tuple[npt.NDArray[np.float32], tuple[int, int, int]]:
    """An image as Qwen3-VL reads it: scaled to -1..1, cut into patches, those that will be merged side by side.

    Args:
        pixels: [height, width, 3] uint8, both sides a multiple of 32.

    Returns: [n_patches, 3 * 2 * 16 * 16] float32, and the number of patches in time, height and width.

    Source: the layout of transformers' Qwen2VLImageProcessor (patch 16, merge 2, mean = std = 0.5); it is tested
        against that.
    """
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    values = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    blocks = values.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, 3, 1, PATCH, PATCH)
    return np.repeat(ordered, TEMPORAL, axis=2).reshape(rows * columns, -1), (1, rows, columns)


def _mask(shape: str, column: int, row: int, radius: int) -> Mask:
    y, x = np.mgrid[:SIDE, :SIDE]
    dx, dy = x - column, y - row
    distance = dx**2 + dy**2
    if shape == "circle":
        return distance <= radius**2
    if shape == "square":
        return np.maximum(abs(dx), abs(dy)) <= radius * 0.85
    if shape == "triangle":
        return (dy <= radius * 0.8) & (abs(dx) * 2 <= dy + radius)
    if shape == "cross":
        return (np.minimum(abs(dx), abs(dy)) <= radius * 0.3) & (np.maximum(abs(dx), abs(dy)) <= radius)
    return (distance <= radius**2) & (distance >= (radius * 0.55) ** 2)
