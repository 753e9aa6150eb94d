"""Pictures say what they show, and no name covers another."""

import itertools
from typing import Any

import msgspec

from sweep.report.plots import Point, front_picture, spread


def point(bits: float, kl: float, **more: Any) -> Point:
    return Point(effective_bits=bits, gb=bits / 10, predicted_kl=kl, **more)


def test_labels_do_not_cover_each_other_and_stay_in_the_picture() -> None:
    labels = [(10.0, 50.0, 40.0), (10.0, 49.0, 40.0), (20.0, 48.0, 40.0), (90.0, 50.0, 40.0), (92.0, 10.0, 5.0)]
    placed = spread(labels, right_edge=100.0)
    assert placed[0] == (16.0, 50.0)
    assert placed[3] == (44.0, 43.0)  # left of its point, and below the first
    assert all(left + width <= 100 for (left, _), (_, _, width) in zip(placed, labels, strict=True))
    for (a, (ax, ay)), (b, (bx, by)) in itertools.combinations(enumerate(placed), 2):
        assert ax + labels[a][2] <= bx or bx + labels[b][2] <= ax or abs(ay - by) >= 7


def test_the_front_names_formats_and_recipes() -> None:
    front = [point(4.0, 0.1), point(8.0, 0.01), point(16.0, 0.0)]
    uniform, mine = [point(8.0, 0.02, format="wfp8_afp8/default")], [point(5.0, 0.05, name="mine", measured_kl=0.06)]
    title = "tiny, texts/large, scales fused, dtype float32"
    picture = front_picture(front, uniform, mine, title).decode()
    for text in ("wfp8_afp8/default", "mine", "weights, GB", "KL, nats per prediction", "recipe, measured", title):
        assert f">{text}</text>" in picture


def test_without_a_models_size_the_axis_is_bits() -> None:
    front = [msgspec.structs.replace(point(*each), gb=None) for each in ((4.0, 0.1), (8.0, 0.01))]
    assert ">bits a weight</text>" in front_picture(front, [], [], "").decode()
