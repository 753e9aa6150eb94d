"""Scenes are what their captions say, the same on every machine, and patched as transformers does it."""

import hashlib
import importlib

import numpy as np
import pytest

from workers import scenes
from workers.scenes import COLOURS, SHAPES, patches, scene


def colour_at(pixels: np.ndarray, rows: slice, columns: slice) -> str:
    """The name of the colour nearest to an area's mean."""
    mean = pixels[rows, columns].reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - mean).sum()))


def foreground(pixels: np.ndarray, background: str) -> np.ndarray:
    """Which pixels differ from the background colour by more than noise and tint can."""
    return (np.abs(pixels.astype(int) - COLOURS[background]) > 24).any(axis=2)


def background_of(caption: str) -> str:
    return caption.split()[-2]


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


def test_captions_and_images_differ_between_scenes() -> None:
    drawn = [scene(i) for i in range(512)]
    assert len({s.pixels.tobytes() for s in drawn}) == 512
    assert len({s.caption for s in drawn}) > 480  # a lone shape has 7,128 captions x 12 backgrounds: few may repeat
    assert {s.pixels.shape for s in drawn} == {(64, 64, 3)}
    assert {s.pixels.dtype for s in drawn} == {np.dtype(np.uint8)}


def test_the_corner_shows_the_background_that_the_caption_names() -> None:
    for index in range(200):
        drawn = scene(index)
        corners = [drawn.pixels[:2, :2], drawn.pixels[:2, -2:], drawn.pixels[-2:, :2], drawn.pixels[-2:, -2:]]
        mean = np.mean([corner.reshape(-1, 3).mean(axis=0) for corner in corners], axis=0)
        nearest = min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - mean).sum()))
        assert nearest == background_of(drawn.caption), drawn.caption


def test_a_lone_shape_is_where_its_caption_says() -> None:
    rows = {"upper": 0, "top": 0, "left": 1, "middle": 1, "right": 1, "lower": 2, "bottom": 2}
    columns = {"left": 0, "top": 1, "middle": 1, "bottom": 1, "right": 2}
    places = {place: (r, c) for r, row in enumerate(scenes.PLACES) for c, place in enumerate(row)}
    n_checked = 0
    for index in range(300):
        drawn = scene(index)
        place = next((p for p in places if f" {p} on a" in drawn.caption), None)
        if place is None:
            continue
        ys, xs = np.nonzero(foreground(drawn.pixels, background_of(drawn.caption)))
        words = [word for word in place.split() if word in rows or word in columns]
        assert int(ys.mean() * 3 / 64) == rows[words[0]], drawn.caption
        assert int(xs.mean() * 3 / 64) == columns[words[-1]], drawn.caption
        n_checked += 1
    assert n_checked > 50


@pytest.mark.parametrize("word", ["left of", "right of", "above", "below"])
def test_the_named_colours_stand_in_the_named_relation(word: str) -> None:
    n_checked = 0
    for index in range(400):
        drawn = scene(index)
        if f" {word} " not in drawn.caption:
            continue
        first, second = (part.split()[2] for part in drawn.caption.split(f" {word} "))
        half = {
            "left of": (drawn.pixels[:, :32], drawn.pixels[:, 32:]),
            "right of": (drawn.pixels[:, 32:], drawn.pixels[:, :32]),
            "above": (drawn.pixels[:32], drawn.pixels[32:]),
            "below": (drawn.pixels[32:], drawn.pixels[:32]),
        }[word]
        for pixels, colour in zip(half, (first, second), strict=True):
            inside = pixels[foreground(pixels, background_of(drawn.caption))]
            middle = np.median(inside, axis=0)  # edge pixels are mixtures
            assert min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - middle).sum())) == colour, drawn.caption
        n_checked += 1
    assert n_checked > 15


def test_a_large_circle_has_the_area_of_its_radius() -> None:
    distance = scenes._distance("circle", 32.0, 32.0, 10.0)
    assert np.clip(0.5 - distance, 0, 1).sum() == pytest.approx(np.pi * 100, rel=0.005)
    square = scenes._distance("square", 32.0, 32.0, 10.0)
    assert np.clip(0.5 - square, 0, 1).sum() == pytest.approx(17 * 17, rel=0.005)


def test_every_shape_stays_inside_its_radius_and_the_image() -> None:
    axis = np.arange(64) + 0.5 - 32
    far = np.maximum(np.abs(axis)[None, :], np.abs(axis)[:, None]) > 1.2 * 10 + 1
    for shape in SHAPES:
        assert (scenes._distance(shape, 32.0, 32.0, 10.0)[far] > 0.5).all()


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


def test_an_image_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="48 x 64"):
        patches(np.zeros((48, 64, 3), dtype=np.uint8))


def test_scenes_imports_numpy_alone() -> None:
    source = importlib.util.find_spec("workers.scenes")
    assert source is not None
    assert source.origin is not None
    with open(source.origin, encoding="utf-8") as file:
        imported = {line.split()[1] for line in file if line.startswith(("import ", "from "))}
    assert imported == {"dataclasses", "typing", "numpy", "numpy.typing"}
