"""Calibration data: one plan that depends on the data alone, and texts that are refused when they cannot be scored."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sweep.core.batches import ANSWER, FIRST_TOKEN, IMAGE, PROMPT, Batch, Picture, Plan, Sample, picture_tensors
from sweep.core.errors import SweepError
from sweep.core.sizes import SIZES, boundaries, n_samples_of, size_name
from workers.data.batches import MAX_BATCH_TOKENS, make_plan
from workers.data.samples import (
    first_texts,
    read_captions,
    read_hub_captions,
    scene_captions,
    text_samples,
    with_scenes,
)
from workers.data.scenes import patches, scene

VISION = {"vision_start": 1, "vision_end": 2, "image_token": 3, "merge": 2}
LAYOUTS = pytest.mark.parametrize("packed", [True, False], ids=["packed", "stacked"])


def samples(n: int, longest: int = 120) -> list[Sample]:
    random = np.random.default_rng(n)
    return [Sample(token_ids=random.integers(5, 500, size=random.integers(2, longest + 1))) for _ in range(n)]


def scenes(n: int) -> list[Sample]:
    random = np.random.default_rng(7)
    return with_scenes(
        text_samples([random.integers(5, 500, size=random.integers(9, 15)).tolist() for _ in range(n)], 512), **VISION
    )


SAMPLES = samples(512)


def same(one: Batch, other: Batch) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys() and all(
        np.array_equal(one.tensors[key], other.tensors[key]) for key in one.tensors
    )
    rows = np.array_equal(one.kinds, other.kinds) and np.array_equal(one.predicts, other.predicts)
    return tensors and rows and (one.order, one.lengths) == (other.order, other.lengths)


def n_tokens(batch: Batch) -> int:
    return batch.tensors["input_ids"].size


@LAYOUTS
@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_a_prefix_down_to_the_last_bit(size: str, packed: bool) -> None:
    """Scores of `small` taken alone are those taken from the capture of `large`."""
    alone, of_large = make_plan(SAMPLES[: SIZES[size]], packed=packed), make_plan(SAMPLES, packed=packed)
    one, other = list(alone.batches(size)), list(of_large.batches(size))
    assert len(one) == len(other)
    assert all(same(mine, its) for mine, its in zip(one, other, strict=True))
    assert alone.digest(size) == of_large.digest(size)


@LAYOUTS
@pytest.mark.parametrize("size", SIZES)
def test_a_size_holds_its_samples_each_once(size: str, packed: bool) -> None:
    plan = make_plan(SAMPLES, packed=packed)
    assert sorted(i for batch in plan.batches(size) for i in batch.order) == list(range(SIZES[size]))
    assert plan.n_predictions(size) == sum(len(sample.token_ids) for sample in SAMPLES[: SIZES[size]]) - SIZES[size]


@LAYOUTS
def test_no_segment_straddles_a_size_boundary(packed: bool) -> None:
    segments = make_plan(SAMPLES, packed=packed).segments
    for segment, indices in zip(segments, (range(0, 16), range(16, 128), range(128, 512)), strict=True):
        assert sorted(i for batch in segment for i in batch.order) == list(indices)


@LAYOUTS
def test_rows_are_the_samples_tokens_in_order_without_padding(packed: bool) -> None:
    for batch in make_plan(SAMPLES, packed=packed).batches("large"):
        rows = np.concatenate([SAMPLES[i].token_ids for i in batch.order])
        np.testing.assert_array_equal(batch.tensors["input_ids"].ravel(), rows)
        np.testing.assert_array_equal(
            batch.tensors["position_ids"].ravel(), np.concatenate([np.arange(n) for n in batch.lengths])
        )
        assert batch.lengths == tuple(len(SAMPLES[i].token_ids) for i in batch.order)
        assert batch.tensors["input_ids"].shape[0] == (1 if packed else len(batch.order))


@LAYOUTS
def test_batches_are_bounded_in_tokens_and_one_long_sample_is_kept_whole(packed: bool) -> None:
    long = [
        *SAMPLES[:14],
        Sample(token_ids=np.arange(MAX_BATCH_TOKENS)),
        Sample(token_ids=np.arange(MAX_BATCH_TOKENS + 88)),
    ]
    batches = list(make_plan(long, packed=packed).batches("small"))
    assert [batch.order for batch in batches[-2:]] == [(14,), (15,)]
    assert all(n_tokens(batch) <= MAX_BATCH_TOKENS for batch in batches[:-1])
    assert n_tokens(batches[-1]) == MAX_BATCH_TOKENS + 88


def test_packed_batches_are_filled() -> None:
    """Sorted by length, a batch ends only where the next sample would not fit."""
    for segment in make_plan(SAMPLES, packed=True).segments:
        assert all(n_tokens(batch) + following.lengths[0] > MAX_BATCH_TOKENS for batch, following in pairwise(segment))


def test_what_follows_a_size_does_not_change_it() -> None:
    other = [*SAMPLES[:128], *samples(384, longest=9)]
    one, changed = make_plan(SAMPLES, packed=True), make_plan(other, packed=True)
    assert [one.digest(size) == changed.digest(size) for size in SIZES] == [True, True, False]


def changed_batch(batch: Batch, key: str) -> Batch:
    """The same with one value of a tensor of its last sample changed."""
    if key in batch.tensors:
        array = batch.tensors[key].copy()
        array.flat[-1] += 1
        return replace(batch, tensors=batch.tensors | {key: array})
    *before, (picture,) = batch.pictures
    if key in picture.tensors:
        return replace(batch, pictures=(*before, (replace(picture, tensors={key: picture.tensors[key] + 1}),)))
    assert picture.values is not None
    return replace(batch, pictures=(*before, (replace(picture, values=picture.values + 1),)))


@pytest.mark.parametrize("key", ["input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"])
def test_the_digest_covers_every_tensor(key: str) -> None:
    plan = make_plan(scenes(16), packed=True)
    (*before, last), *_ = plan.segments
    assert Plan(segments=((*before, changed_batch(last, key)),)).digest("small") != plan.digest("small")


def test_the_digest_covers_kinds_and_predictions_of_conversations_and_pictures_in_files() -> None:
    """Of plain texts they follow from the tokens, and stores of earlier programs have no word for them."""
    text = Sample(token_ids=np.arange(5))
    kinds = np.array([PROMPT, PROMPT, ANSWER, ANSWER, PROMPT], dtype=np.uint8)
    answered = replace(text, kinds=kinds, predicts=np.array([False, True, True, False, False]))
    picture = Picture(content="a", shape=(4, 8), n_rows=4, tensors={})
    variants = [
        text,
        answered,
        replace(answered, predicts=np.array([False, True, False, False, False])),
        replace(answered, kinds=kinds[::-1]),
        replace(text, pictures=(picture,)),
        replace(text, pictures=(replace(picture, content="b"),)),
    ]
    assert len({make_plan([each, text], packed=False).digest("2") for each in variants}) == len(variants)
    same_as_text = replace(text, kinds=np.full(5, PROMPT, dtype=np.uint8), predicts=np.arange(5) < 4)
    assert make_plan([same_as_text], packed=True).digest("2") == make_plan([text], packed=True).digest("2")


def test_the_digest_tells_shapes_types_and_orders_apart() -> None:
    def digest(**changed: object) -> str:
        batch = Batch(
            order=(0, 1),
            lengths=(2, 2),
            tensors={"input_ids": np.arange(4)[None]},
            kinds=np.full(4, PROMPT, dtype=np.uint8),
            predicts=np.array([True, False, True, False]),
            pictures=((), ()),
        )
        return Plan(segments=((replace(batch, **changed),),)).digest("small")  # pyright: ignore[reportArgumentType]

    tensors = [np.arange(4)[None], np.arange(4).reshape(2, 2), np.arange(4, dtype=np.int32)[None]]
    digests = [digest(tensors={"input_ids": tensor}) for tensor in tensors] + [
        digest(tensors={"position_ids": tensors[0]}),
        digest(order=(1, 0)),
    ]
    assert len(set(digests)) == 5


def test_data_sets_in_other_orders_have_other_digests() -> None:
    """Their batches are equal where lengths differ, but sample scores are kept in data set order."""
    texts = [list(range(n)) for n in range(2, 18)]
    one, other = (make_plan(text_samples(order, 512), packed=True) for order in (texts, texts[::-1]))
    np.testing.assert_array_equal(one.segments[0][0].tensors["input_ids"], other.segments[0][0].tensors["input_ids"])
    assert one.digest("small") != other.digest("small")


def test_an_image_stands_before_its_caption_one_token_a_merged_patch() -> None:
    (first, second), captions = (
        with_scenes(text_samples([[10, 11], [12, 13, 14]], 512), **VISION),
        [[10, 11], [12, 13, 14]],
    )
    for index, (sample, caption) in enumerate(zip((first, second), captions, strict=True)):
        assert sample.token_ids.tolist() == [1, 3, 3, 3, 3, 2, *caption]  # 64 x 64 pixels: 4 x 4 patches, merged 2 x 2
        (picture,) = sample.pictures
        assert picture.tensors["image_grid_thw"].tolist() == [[1, 4, 4]]
        assert picture.values is not None
        np.testing.assert_array_equal(picture.values, patches(scene(index).pixels)[0])
        assert sample.token_kinds.tolist() == [FIRST_TOKEN, *[IMAGE] * 4, *[PROMPT] * (1 + len(caption))]
    assert scene_captions(2) == [scene(0).caption, scene(1).caption]


def test_batches_of_images_are_stacked_and_keep_pixels_in_the_order_of_rows() -> None:
    drawn = scenes(16)
    for batch in make_plan(drawn, packed=True).batches("small"):
        assert len(set(batch.lengths)) == 1
        assert batch.patch_counts == (16,) * len(batch.order)
        assert batch.all_pictures == [drawn[i].pictures[0] for i in batch.order]
        assert picture_tensors(batch.all_pictures)["image_grid_thw"].tolist() == [[1, 4, 4]] * len(batch.order)
        assert batch.tensors["mm_token_type_ids"].sum(axis=1).tolist() == [4] * len(batch.order)
        assert "position_ids" not in batch.tensors  # three coordinates, which the model finds itself


@LAYOUTS
@pytest.mark.parametrize("n", [2, 20, 64, 300])
def test_a_size_inside_a_segment_is_its_leading_samples_and_changes_no_other(n: int, packed: bool) -> None:
    plan, size = make_plan(SAMPLES, packed=packed), str(n)
    batches = list(plan.batches(size))
    assert plan.is_inside(size)
    assert sorted(i for batch in batches for i in batch.order) == list(range(n))
    for batch in batches:
        rows = np.concatenate([SAMPLES[i].token_ids for i in batch.order])
        np.testing.assert_array_equal(batch.tensors["input_ids"].ravel(), rows)
    assert plan.sample_predictions(size) == [len(sample.token_ids) - 1 for sample in SAMPLES[:n]]
    assert plan.n_predictions(size) == sum(plan.sample_predictions(size))
    whole = {n: plan.digest(size) for n, size in zip(SIZES.values(), SIZES, strict=True)}
    assert plan.digest(size) not in whole.values()
    assert plan.digest(size) != plan.digest(str(n + 1))
    assert [plan.digest(name) for name in SIZES] == list(whole.values())


def test_sizes_that_have_a_name_are_called_by_it_and_boundaries_go_on_in_steps_of_the_largest() -> None:
    assert [size_name(n) for n in (16, 128, 512, 64)] == ["small", "medium", "large", "64"]
    assert [boundaries(n) for n in (2, 16, 17, 512, 513, 1025)] == [
        [16],
        [16],
        [16, 128],
        [16, 128, 512],
        [16, 128, 512, 1024],
        [16, 128, 512, 1024, 1536],
    ]
    for wrong in ("1", "0", "-4", "1.5", "huge", "", "\N{FULLWIDTH DIGIT NINE}"):
        with pytest.raises(SweepError, match="is no size"):
            n_samples_of(wrong)


def captions(n: int) -> list[str]:
    return [f"caption {i}" for i in range(n)]


@pytest.mark.parametrize("n_samples", [16, 20])
@pytest.mark.parametrize(
    ("join", "prefix", "end"),
    [("\n", "", ""), ("\n", "", "\n"), ("\r\n", "", "\r\n\r\n"), ("  \n ", "", "\n \n"), ("\n", "\ufeff", "\n")],
)
def test_captions_are_a_files_first_lines(join: str, prefix: str, end: str, n_samples: int, tmp_path: Path) -> None:
    """Whatever the line ends, spaces around, empty lines at the end, and the byte order mark of some editors."""
    path = tmp_path / "captions.txt"
    path.write_bytes((prefix + join.join(captions(20)) + end).encode())
    assert read_captions(path, n_samples) == captions(n_samples)


def test_a_caption_ends_at_its_line_and_nowhere_else(tmp_path: Path) -> None:
    odd = [f"a\u2028caption\x0cof\x85one line, ein Füchslein {i}" for i in range(16)]
    (tmp_path / "captions.txt").write_text("\n".join(odd), encoding="utf-8")
    assert read_captions(tmp_path / "captions.txt", 16) == odd


@pytest.mark.parametrize(
    ("content", "n_samples", "message"),
    [
        (b"", 16, "holds 0 captions; 16 are needed. Give more captions."),
        (b"\n \n", 16, "holds 0 captions; 16 are needed."),
        (
            "\n".join(captions(15)).encode(),
            16,
            "holds 15 captions; 16 are needed. Type dataset.size=15, or give more captions.",
        ),
        (
            "\n".join(captions(130)).encode(),
            512,
            "holds 130 captions; 512 are needed. "
            "Type dataset.size=small or dataset.size=medium or dataset.size=130, or give more captions.",
        ),
        ("\n".join([*captions(3), " ", *captions(20)]).encode(), 16, "Caption 4 of the captions file"),
        (
            "\n".join(captions(20)).encode("utf-16"),
            16,
            "Give a UTF-8 text file with one caption a line: dataset.captions_path=FILE.",
        ),
        (b"caf\xe9\n" * 20, 16, "Give a UTF-8 text file"),
        (None, 16, "No such file or directory"),
    ],
)
def test_captions_that_cannot_be_used_are_refused(
    content: bytes | None, n_samples: int, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "captions.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SweepError) as error:
        read_captions(path, n_samples)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_blank_caption_after_the_size_does_not_matter() -> None:
    assert first_texts([*captions(16), "", "more"], 16, "file") == captions(16)


def hub_directory(directory: Path, values: Sequence[object]) -> str:
    """A data set as the hub has it, with one text column."""
    directory.mkdir()
    (directory / "train.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return str(directory)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([f" caption {i} " for i in range(20)], captions(16)),
        ([[f"caption {i}", "another"] for i in range(20)], captions(16)),
    ],
    ids=["text", "list of texts"],
)
def test_hub_captions_are_the_columns_first_texts(
    values: Sequence[object], expected: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    assert read_hub_captions(hub_directory(tmp_path / "set", values), "train", "text", 16) == expected


@pytest.mark.parametrize(
    ("values", "split", "column", "message"),
    [
        (captions(20), "train", "caption", "column 'caption'"),
        (captions(20), "test", "text", "split 'test'"),
        (captions(9), "train", "text", "holds 9 captions; 16 are needed."),
        ([*captions(3), None, *captions(20)], "train", "text", "Caption 4 of the data set"),
        ([["a"], [], *[["b"]] * 20], "train", "text", "Caption 2 of the data set"),
    ],
)
def test_hub_captions_that_cannot_be_used_are_refused(
    values: Sequence[object], split: str, column: str, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(SweepError) as error:
        read_hub_captions(hub_directory(tmp_path / "set", values), split, column, 16)
    assert message in str(error.value)


@pytest.mark.parametrize("max_tokens", [2, 3, 512])
def test_a_text_is_cut_at_max_tokens(max_tokens: int) -> None:
    cut = text_samples([[1, 2], [1, 2, 3, 4], list(range(600))], max_tokens)
    assert [len(sample.token_ids) for sample in cut] == [2, min(4, max_tokens), max_tokens]
    assert cut[1].token_ids.tolist() == [1, 2, 3, 4][:max_tokens]
    assert {sample.token_ids.dtype for sample in cut} == {np.dtype(np.int64)}


@pytest.mark.parametrize("ids", [[], [7]])
def test_a_text_without_a_token_to_predict_is_refused(ids: list[int]) -> None:
    with pytest.raises(SweepError, match=rf"Sample 2 has {len(ids)} token\(s\); at least 2 are needed"):
        text_samples([[1, 2], ids, [3]], 512)
