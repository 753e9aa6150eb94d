"""Stock `mtq.auto_quantize` at its best: samples sorted by length, padded to the longest of a batch."""

# pyright: basic

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sweep.core.batches import Sample
from sweep.formats.recipe import Entry

PaddedBatch = dict[str, Tensor]


def padded_batches(samples: Sequence[Sample], batch_size: int, device: torch.device) -> list[PaddedBatch]:
    """Batches of samples of about one length, padded right; labels are shifted, -100 where nothing is predicted."""
    ordered = sorted(samples, key=lambda sample: len(sample.token_ids))
    batches: list[PaddedBatch] = []
    for start in range(0, len(ordered), batch_size):
        tokens = [torch.from_numpy(sample.token_ids) for sample in ordered[start : start + batch_size]]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(
            [F.pad(t[1:], (0, 1), value=-100) for t in tokens], batch_first=True, padding_value=-100
        )
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)})
    return batches


def auto_quantize(
    model: nn.Module,
    formats: Sequence[Sequence[Entry]],
    batches: Sequence[PaddedBatch],
    method: str = "gradient",
) -> dict[str, list[float]]:
    """Score every language-model group under `formats` in one call; with several of them the scores are clamped."""
    clone = copy.deepcopy(model).requires_grad_(True)

    def forward_step(network: nn.Module, batch: PaddedBatch) -> Tensor:
        return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits

    def loss(logits: Tensor, batch: PaddedBatch) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=-100, reduction="sum"
        )

    quantization_formats: list[Any] = [
        {"quant_cfg": list(map(Entry.to_modelopt, entries)), "algorithm": "max"} for entries in formats
    ]
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        _, state = mtq.auto_quantize(
            clone,
            constraints={"effective_bits": 16.0},
            quantization_formats=quantization_formats,
            data_loader=list(batches),
            forward_step=forward_step,
            loss_func=loss if method == "gradient" else None,
            method=method,
            disabled_layers=["*lm_head*", "*visual*"],
            num_calib_steps=len(batches),
            num_score_steps=len(batches),
            verbose=False,
        )
    scores = {name: stats["scores"] for name, stats in state["candidate_stats"].items()}
    return {name: list(map(float, each)) for name, each in scores.items() if len(each) > 1}
