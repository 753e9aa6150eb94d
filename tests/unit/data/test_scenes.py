"""Scenes are what their captions say, the same on every machine, and patched as transformers does it."""

import hashlib
import importlib

import numpy as np
import pytest

from workers.data import scenes
from workers.data.scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, patches, scene


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == np.array(colour)).all(axis=-1)


def test_a_scene_depends_on_its_index_alone() -> None:
    first = scene(7)
    scene(8)
    again = scene(7)
    assert first.caption == again.caption
    np.testing.assert_array_equal(first.pixels, again.pixels)


def test_the_shipped_scenes_never_change() -> None:
    """Scores of the data set `scenes` are comparable across machines and versions only as long as this holds."""
    digest = hashlib.sha256()
    for index in range(512):
        drawn = scene(index)
        digest.update(drawn.caption.encode())
        digest.update(drawn.pixels.tobytes())
    assert digest.hexdigest() == "4ce40cdf0ae436baa20f0d04029a02e183fe29ef533192ae1881a68a88716043"


def test_images_differ_and_captions_are_many() -> None:
    drawn = [scene(i) for i in range(512)]
    assert len({s.pixels.tobytes() for s in drawn}) == 512
    assert len({s.caption for s in drawn}) > 480  # of 16,800
    assert {(s.pixels.shape, s.pixels.dtype) for s in drawn} == {((64, 64, 3), np.dtype(np.uint8))}


def test_the_corners_show_the_background_that_the_caption_names() -> None:
    for index in range(200):
        drawn = scene(index)
        corners = drawn.pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert is_colour(corners, BACKGROUNDS[drawn.caption.split()[-2]]).all(), drawn.caption


@pytest.mark.parametrize("word", PLACES)
def test_the_named_colours_stand_in_the_named_relation(word: str) -> None:
    n_checked = 0
    for index in range(400):
        drawn = scene(index)
        if f" {word} " not in drawn.caption:
            continue
        first, second = (part.split()[1] for part in drawn.caption.split(f" {word} "))
        (y1, x1), (y2, x2) = (
            np.argwhere(is_colour(drawn.pixels, COLOURS[colour])).mean(axis=0) for colour in (first, second)
        )
        assert {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}[word], drawn.caption
        n_checked += 1
    assert n_checked > 50


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_stays_inside_its_radius_and_has_its_area(shape: str) -> None:
    y, x = np.nonzero(scenes._mask(shape, 32, 30, 12))
    assert np.maximum(abs(x - 32), abs(y - 30)).max() <= 12
    areas = {
        "circle": np.pi * 144,
        "square": 21**2,
        "triangle": 21.6**2 / 2,
        "cross": 2 * 25 * 7 - 49,
        "ring": np.pi * (144 - 6.6**2),
    }
    assert len(x) == pytest.approx(areas[shape], rel=0.12)


def test_patches_are_those_of_transformers() -> None:
    pytest.importorskip("PIL")
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = module.Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for index in range(8):
        pixels = scene(index).pixels
        expected = processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
        values, grid = patches(pixels)
        np.testing.assert_array_equal(values, expected["pixel_values"])
        assert values.dtype == np.float32
        assert values.shape == (16, 1536)
        assert [list(grid)] == expected["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_patches_that_merge_are_neighbours() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32, 32:] = 255  # the upper right quarter: the second merged token, patches 4 to 7
    values, _ = patches(pixels)
    assert values.min(axis=1).tolist() == [-1.0] * 4 + [1.0] * 4 + [-1.0] * 8


def test_scenes_imports_numpy_alone() -> None:
    source = importlib.util.find_spec("workers.data.scenes")
    assert source is not None
    assert source.origin is not None
    with open(source.origin, encoding="utf-8") as file:
        imported = {line.split()[1] for line in file if line.startswith(("import ", "from "))}
    assert imported == {"dataclasses", "typing", "numpy", "numpy.typing"}
