"""Texts that the unquantized model writes, and the probabilities that it and a quantized one give to texts' tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sweep.core.batches import Batch, Int64Array
from workers.model.decoder import head_of
from workers.model.loading import PreTrainedModel, key_value_cache
from workers.quant.linear import LinearQuant
from workers.scoring.baseline import float_logits
from workers.scoring.divergence import divergence
from workers.scoring.validation import Rows, Validator, finite, input_of

_TEXTS: Final = 64  # written at a time: 2.5 GB of keys and values for 4B in bf16, at 132 tokens each

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Two models at the predictions of some texts, text after text; all in nats."""

    unquantized: FloatArray  # [predictions], log probability of the text's next token
    quantized: FloatArray
    kl: FloatArray  # [predictions], KL(unquantized || quantized)
    reverse_kl: FloatArray  # [predictions], KL(quantized || unquantized)
    unquantized_listed: FloatArray  # [predictions, listed], log probabilities of the tokens asked for
    quantized_listed: FloatArray


@torch.no_grad()
def sample_texts(model: PreTrainedModel, prefixes_NP: Int64Array, uniforms_NT: FloatArray) -> Int64Array:
    """Continue texts with tokens drawn from the model's own distribution, at temperature 1.

    Tokens are drawn by inverting the cumulative distribution of logits in float32, as those that texts are scored by.

    Args:
        model: evaluation mode (workers.model.loading.load).
        prefixes_NP: [texts, prefix tokens], token ids.
        uniforms_NT: [texts, tokens to draw], from 0 to below 1; equal ones give equal texts.

    Returns: [texts, prefix tokens + tokens to draw].
    """
    written: list[Tensor] = []
    for start in range(0, len(prefixes_NP), _TEXTS):
        some = slice(start, start + _TEXTS)
        written.append(_continued(model, torch.from_numpy(prefixes_NP[some]), torch.from_numpy(uniforms_NT[some])))
    return torch.cat(written).numpy()


def _continued(model: PreTrainedModel, text_NT: Tensor, uniforms_NT: Tensor) -> Tensor:
    device, (_, head) = next(model.parameters()).device, head_of(model)
    text_NT, uniforms_NT = text_NT.to(device), uniforms_NT.to(device)
    cache, n_read = key_value_cache(model), 0
    with input_of(head) as last_input:
        for uniform_N in uniforms_NT.unbind(1):
            positions = torch.arange(n_read, text_NT.shape[1], device=device).expand(len(text_NT), -1)
            model(input_ids=text_NT[:, n_read:], position_ids=positions, **cache)
            n_read = text_NT.shape[1]
            last_NH = last_input().unflatten(0, (len(text_NT), -1))[:, -1]
            cumulative_NV = float_logits(head, last_NH).softmax(1, dtype=torch.float64).cumsum(1)
            drawn_N = torch.searchsorted(cumulative_NV, uniform_N[:, None] * cumulative_NV[:, -1:], right=True)
            text_NT = torch.cat([text_NT, drawn_N], dim=1)
    return text_NT.cpu()


def score_tokens(
    model: PreTrainedModel, quants: Mapping[str, LinearQuant], batches: Sequence[Batch], listed: Int64Array
) -> TokenScores:
    """Score texts under the unquantized model and the quantized one.

    Args:
        model: as for `Validator`.
        quants: calibrated, by module name.
        batches: of all texts.
        listed: [predictions, listed], tokens whose log probabilities are asked for, besides the next one's.

    Raises: SweepError: a logit is NaN or infinite.
    """
    lengths = np.zeros(1 + max(max(batch.order) for batch in batches), dtype=np.int64)
    for batch in batches:
        lengths[list(batch.order)] = batch.lengths
    firsts = np.cumsum(lengths - 1) - (lengths - 1)  # number of each text's first prediction
    scalars, listed_twice = np.zeros((4, len(listed))), np.zeros((2, *listed.shape))

    def see(rows: Rows) -> None:
        numbers = _numbers(rows.batch, firsts)[rows.rows_R.cpu().numpy()]
        found = _scored(rows, torch.from_numpy(listed[numbers]).to(rows.change_RV.device))
        scalars[:, numbers], listed_twice[:, numbers] = (finite(each.double().cpu().numpy()) for each in found)

    Validator(model, batches).compare(quants, see)
    unquantized, quantized, kl, reverse_kl = scalars
    return TokenScores(
        unquantized=unquantized,
        quantized=quantized,
        kl=kl,
        reverse_kl=reverse_kl,
        unquantized_listed=listed_twice[0],
        quantized_listed=listed_twice[1],
    )


def concatenated(scores: Sequence[TokenScores]) -> TokenScores:
    """The scores of several lists of texts, one after another."""
    arrays: dict[str, FloatArray] = {}
    for name in (field.name for field in fields(TokenScores)):
        arrays[name] = np.concatenate([getattr(each, name) for each in scores])
    return TokenScores(**arrays)


def _numbers(batch: Batch, firsts: Int64Array) -> Int64Array:
    """The number of the prediction that each row of the flattened batch makes; the last row of a text makes none."""
    starts = [firsts[text] + np.arange(length) for text, length in zip(batch.order, batch.lengths, strict=True)]
    return np.concatenate(starts)


def _scored(rows: Rows, listed_RL: Tensor) -> tuple[Tensor, Tensor]:
    """[4, rows]: TokenScores' first four; [2, rows, listed]: its last two."""
    log_p_RV, change_RV = rows.log_probs_RV, rows.change_RV
    log_q_RV = (log_p_RV + change_RV).log_softmax(1)
    next_R1 = rows.labels_R[:, None]
    unquantized_R = log_p_RV.gather(1, next_R1)[:, 0].double()
    scalars = [
        unquantized_R,
        unquantized_R - rows.loss_change().double(),  # the difference of two log probabilities would be rounded twice
        divergence(log_p_RV, change_RV),
        divergence(log_q_RV, -change_RV),
    ]
    return torch.stack(scalars), torch.stack([log_p_RV.gather(1, listed_RL), log_q_RV.gather(1, listed_RL)])
