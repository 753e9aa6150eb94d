"""KL between the unquantized model and the one that a server serves, beside the KL that validation measures.

A server gives log probabilities of a few tokens, not of the whole vocabulary. Three ways lead from them to the KL:

* texts that the unquantized model writes: with r = q(token) / p(token), the mean of r - 1 - log r over tokens drawn
  from p is KL(p || q), without bias, and no term is negative;
* the validation samples: the KL of distributions over the server's likeliest tokens, and one bucket for all others,
  is no larger than that over the vocabulary;
* texts that the server writes, which decode kernels compute and not those of prefill: the same mean with p and q
  exchanged is KL(q || p).
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import numpy.typing as npt

from sweep.core.batches import Int64Array, Sample
from sweep.core.errors import SweepError
from sweep.core.sizes import SIZES
from sweep.mixed_precision.measured import held_out
from sweep.mixed_precision.openai_server import Server, check_prompt_log_probs, connect, in_parallel
from sweep.mixed_precision.recipe_context import RecipeContext, load_model
from sweep.plan.model import Model
from sweep.plan.trials import Device
from sweep.report.analysis import FloatArray, bootstrap_interval

if TYPE_CHECKING:
    from workers.scoring.texts import TokenScores

_PREFIX: Final = 4  # tokens of a validation sample with which a written text begins, or fewer where a sample is shorter
_LONGEST: Final = 128  # tokens written to a text
_TOKENS: Final = 2048  # at least, written to all texts together: several to a sample if need be
# Below it a bucket of all other tokens is left out: 1 minus a sum of float32 probabilities has an error of 1e-6.
_REST: Final = 1e-4
# Served / measured above which to ask, as of another checkpoint: the largest of a right export on an H100 is 1.35.
_FAR: Final = 2.0
_NOISE: Final = 1e-3  # nats, below which that is not asked: bf16 alone is 1e-4 away from float32
_MOST: Final = max(SIZES.values())  # texts in a plan of batches

_Way = Literal["sampled", "top", "decode"]
_WORDS: Final[Mapping[_Way, tuple[str, str]]] = {  # how it is measured; which KL
    "sampled": ("texts of the unquantized model", "unquantized || served"),
    "top": ("validation samples, top {n_top} and the rest", "unquantized || served, at least"),
    "decode": ("texts of the server", "served || unquantized"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedOptions:
    """What to ask of which server."""

    url: str
    model: str | None  # its name on the server; None: the only one there
    n_top: int  # likeliest tokens
    decode: bool  # whether the server writes texts, too


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedKl:
    """KL of the served model measured in one way, in nats per token, with 90 % bootstrap intervals over samples."""

    way: _Way
    served_kl: float  # of "top" a lower bound
    served_kl_interval: tuple[float, float]
    measured_kl: float  # of the fake-quantized model on the same tokens, over the whole vocabulary
    measured_kl_interval: tuple[float, float]
    # Served over measured where both are taken in the same way on the same tokens; None: nothing is quantized.
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    n_samples: int
    n_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A served model, and its KL."""

    url: str
    model: str
    root: str | None  # the server's word for where it has the model from
    n_top: int
    kl: tuple[ServedKl, ...]


def find_server(context: RecipeContext, options: ServedOptions) -> Server:
    """Find the server, and check all that can be before the model is loaded.

    Raises: SweepError: no server, one that serves another model, shorter texts or no log probabilities of prompts; or
        the validation samples have pictures.
    """
    vocabulary = context.model.structure.vocabulary
    if not 1 <= options.n_top <= vocabulary:
        raise SweepError(f"--logprobs {options.n_top} is not between 1 and {vocabulary}, the model's vocabulary.")
    texts = _texts(context)
    server = connect(options.url, options.model)
    _check_structure(context, server)
    longest = max(texts, key=lambda text: len(text))
    if server.max_model_len is not None and len(longest) >= server.max_model_len:
        raise SweepError(
            f"{server.url} takes {server.max_model_len} tokens at most; the longest validation sample has "
            f"{len(longest)}, and a request needs one more. Serve with --max-model-len {len(longest) + 1}."
        )
    check_prompt_log_probs(server, longest.tolist(), options.n_top)
    return server


def measure_served(context: RecipeContext, server: Server, options: ServedOptions, device: Device) -> Served:
    """Measure the served model's KL. Raises: SweepError: it is another model, or the server fails."""
    meter = _Meter(context, server, device)
    found = [meter.top(options.n_top), meter.sampled()]
    if options.decode:
        found.append(meter.decode())
    return Served(
        url=server.url,
        model=server.model,
        root=server.root,
        n_top=options.n_top,
        kl=tuple(found),
    )


def served_table(served: Served) -> list[tuple[str, ...]]:
    """Served beside measured KL, with 90 % intervals: a heading, then one row a way to measure."""
    found = [("served", "KL of", "tokens", "served KL", "measured KL, same tokens", "served / measured")]
    for each in served.kl:
        how, which = _WORDS[each.way]
        ratio = "-"
        if each.ratio is not None and each.ratio_interval is not None:
            low, high = each.ratio_interval
            ratio = f"{each.ratio:.3f} ({low:.3f} to {high:.3f})"
        figures = (
            _figure(each.served_kl, each.served_kl_interval),
            _figure(each.measured_kl, each.measured_kl_interval),
        )
        found.append((how.format(n_top=served.n_top), which, str(each.n_tokens), *figures, ratio))
    return found


def served_page(served: Served) -> str:
    """The section of the validation page, as Markdown."""
    heading, *rows = served_table(served)
    rule = ("---", "---", *["---:"] * (len(heading) - 2))
    lines = [f"| {' | '.join(cells)} |".replace("||", r"\|\|") for cells in (heading, rule, *rows)]
    told = f"{describe(served)} Nats per token, with 90 % bootstrap intervals over samples."
    return "\n".join(["", "## Served", "", told, "", *lines, ""])


def describe(served: Served) -> str:
    """The server's words for what it serves, and a warning if it is much further away than measured, in sentences."""
    place = "" if served.root is None else f", from {served.root!r}"
    said = f"{served.url} serves {served.model!r}{place}."
    far = max((each.ratio or 0.0 for each in served.kl if each.served_kl > _NOISE), default=0.0)
    if far > _FAR:
        said += f" That is {far:.1f} times as far as measured: is it the export of this recipe?"
    return said


def excess(log_ratios: FloatArray) -> FloatArray:
    """Of ratios r, r - 1 - log r, which is never negative. Args: log_ratios: log r."""
    return np.expm1(log_ratios) - log_ratios


def bucket_kl(own: FloatArray, other: FloatArray) -> FloatArray:
    """KL of distributions over some tokens, and one bucket for all others: no larger than over the vocabulary.

    It is a sum of p (r - 1 - log r), no term of which is negative: the small difference of p log p and p log q would
    be lost in the rounding of float32.

    Args:
        own: [predictions, tokens], log p; NaN where a prediction has fewer tokens.
        other: log q of the same.

    Returns: KL(p || q), [predictions] nats.
    """
    p, q, logs = np.exp(own), np.exp(other), other - own
    kl = np.nansum(np.where(np.abs(logs) < 1, p * excess(np.clip(logs, -1, 1)), q - p - p * logs), axis=1)
    rest_p, rest_q = (1 - np.nansum(each, axis=1) for each in (p, q))
    has_rest = (rest_p > _REST) & (rest_q > _REST)
    ratio = np.divide(rest_q, rest_p, out=np.ones_like(kl), where=has_rest)
    return kl + np.where(has_rest, rest_p * excess(np.log(ratio)), 0.0)


class _Meter:
    """The unquantized model, the fake-quantized one and the served one, on the same tokens."""

    def __init__(self, context: RecipeContext, server: Server, device: Device) -> None:
        from workers.quant.applied import calibrated_model

        self._context, self._server = context, server
        self._model = load_model(context, device)
        calibration = context.calibration
        self._quants = calibrated_model(self._model, calibration, context.recipe)
        self._samples = _texts(context)
        self._n_prefix = min(_PREFIX, min(map(len, self._samples)) - 1)
        n_written = [min(len(sample) - self._n_prefix, _LONGEST) for sample in self._samples]
        self._jobs = [
            _Job(sample=number, prefix=sample[: self._n_prefix], n_tokens=n_written[number], seed=_seed(sample, turn))
            for turn in range(-(-_TOKENS // sum(n_written)))
            for number, sample in enumerate(self._samples)
        ]

    def top(self, n_top: int) -> ServedKl:
        """KL(unquantized || served) over the server's likeliest tokens on the validation samples: a lower bound.

        Raises: SweepError: the served model is another one.
        """
        samples = self._samples
        answers = in_parallel(
            lambda text: self._server.prompt_log_probs(text.tolist(), n_top), samples, "validation samples"
        )
        tokens = list(itertools.chain.from_iterable(answers))
        width = max(map(len, tokens))
        listed, served = np.zeros((len(tokens), width), dtype=np.int64), np.full((len(tokens), width), np.nan)
        for number, each in enumerate(tokens):
            listed[number, : len(each)], served[number, : len(each)] = list(each), list(each.values())
        self._check_vocabulary(int(listed.max()))
        scores = self._scores(samples, listed)
        none = np.isnan(served)
        own, measured = (np.where(none, np.nan, each) for each in (scores.unquantized_listed, scores.quantized_listed))
        next_ids = np.concatenate([sample[1:] for sample in samples]).tolist()
        loss = -float(np.mean([each[token] for token, each in zip(next_ids, tokens, strict=True)]))
        self._check_loss(loss, -float(scores.unquantized.mean()))
        owners = np.repeat(np.arange(len(samples)), [len(text) - 1 for text in samples])
        return self._figures("top", owners, bucket_kl(own, served), scores.kl, bucket_kl(own, measured))

    def sampled(self) -> ServedKl:
        """KL(unquantized || served) on texts that the unquantized model writes."""
        from workers.scoring.texts import sample_texts

        jobs, longest = self._jobs, max(job.n_tokens for job in self._jobs)
        uniforms = [np.random.default_rng(job.seed).random(longest) for job in jobs]
        written = sample_texts(self._model, np.stack([job.prefix for job in jobs]), np.stack(uniforms))
        texts = [text[: self._n_prefix + job.n_tokens] for text, job in zip(written, jobs, strict=True)]
        answers = in_parallel(
            lambda text: self._server.prompt_log_probs(text.tolist(), 0), texts, "texts of the unquantized model"
        )
        served: list[float] = []
        for text, answer in zip(texts, answers, strict=True):
            served += [each[token] for token, each in zip(text[1:].tolist(), answer, strict=True)]
        scores, is_written = self._scores(texts), self._is_written(texts)
        own, measured = scores.unquantized, scores.quantized
        figures = (excess(np.array(served) - own), scores.kl, excess(measured - own))
        return self._figures("sampled", self._owners(texts), *(each[is_written] for each in figures))

    def decode(self) -> ServedKl:
        """KL(served || unquantized) on texts that the server writes."""
        answers = in_parallel(
            lambda job: self._server.write(job.prefix.tolist(), job.n_tokens, job.seed),
            self._jobs,
            "texts of the server",
        )
        texts = [np.append(job.prefix, ids) for job, (ids, _) in zip(self._jobs, answers, strict=True)]
        self._check_vocabulary(int(max(text.max() for text in texts)))
        scores, is_written = self._scores(texts), self._is_written(texts)
        served = np.concatenate([log_probs for _, log_probs in answers])
        own, measured, kl = (each[is_written] for each in (scores.unquantized, scores.quantized, scores.reverse_kl))
        # The tokens are drawn from the served distribution: weighted, they stand for draws from the measured one.
        expected = np.exp(measured - served) * excess(own - measured)
        return self._figures("decode", self._owners(texts), excess(own - served), kl, expected)

    def _scores(self, texts: Sequence[Int64Array], listed: Int64Array | None = None) -> "TokenScores":
        from workers.scoring.texts import concatenated, score_tokens

        found: list[TokenScores] = []
        if listed is None:
            listed = np.zeros((sum(map(len, texts)) - len(texts), 0), dtype=np.int64)
        for start in range(0, len(texts), _MOST):
            some = texts[start : start + _MOST]
            plan = self._context.model.plan([Sample(token_ids=text) for text in some])
            batches = list(plan.batches(plan.size))
            these, listed = np.split(listed, [sum(map(len, some)) - len(some)])
            found.append(score_tokens(self._model, self._quants, batches, these))
        return concatenated(found)

    def _is_written(self, texts: Sequence[Int64Array]) -> npt.NDArray[np.bool_]:
        """Of each prediction of the texts, whether the token was written, not given."""
        return np.concatenate([np.arange(1, len(text)) >= self._n_prefix for text in texts])

    def _owners(self, texts: Sequence[Int64Array]) -> Int64Array:
        """The validation sample that each written token goes back to."""
        return np.repeat([job.sample for job in self._jobs], [len(text) - self._n_prefix for text in texts])

    def _figures(
        self, way: _Way, owners: Int64Array, served: FloatArray, exact: FloatArray, measured: FloatArray
    ) -> ServedKl:
        """Figures of one way to measure.

        Args:
            way: that it is.
            owners: [tokens], number of the sample that each token belongs to.
            served: [tokens], nats, whose mean is the served model's KL.
            exact: the same for the fake-quantized model, over the whole vocabulary.
            measured: the same for the fake-quantized model, taken as for the served one.
        """
        n_samples, n_tokens, seed = len(self._samples), len(owners), self._context.recipe.model_revision
        sums = np.zeros((3, n_samples))
        for number, each in enumerate((served, exact, measured)):
            np.add.at(sums[number], owners, each)
        low, high = bootstrap_interval(sums, np.bincount(owners, minlength=n_samples).astype(np.float64), seed).tolist()
        quantizes = bool((sums[2] > 0).all())
        return ServedKl(
            way=way,
            served_kl=float(served.mean()),
            served_kl_interval=(low[0], high[0]),
            measured_kl=float(exact.mean()),
            measured_kl_interval=(low[1], high[1]),
            ratio=float(served.sum() / measured.sum()) if quantizes else None,
            ratio_interval=_ratio_interval(sums[0], sums[2], seed) if quantizes else None,
            n_samples=n_samples,
            n_tokens=n_tokens,
        )

    def _check_vocabulary(self, largest: int) -> None:
        n_tokens = self._context.model.structure.vocabulary
        if largest >= n_tokens:
            raise self._another_model(f"it gives token {largest}, and the recipe's model has {n_tokens} tokens")

    def _check_loss(self, served: float, unquantized: float) -> None:
        """Refuse a served model where one of the two knows less than half of what the other knows of the texts.

        Args: losses on the validation samples, nats per token.

        Raises: SweepError: that is so, and the losses are more than 1 nat apart.
        """
        chance = math.log(self._context.model.structure.vocabulary)
        known = chance - min(served, unquantized)
        if abs(served - unquantized) > max(1.0, known / 2):
            raise self._another_model(
                f"on the validation samples its loss is {served:.2f} nats per token, that of the unquantized model "
                f"{unquantized:.2f}, and that of pure chance {chance:.2f}"
            )

    def _another_model(self, why: str) -> SweepError:
        return _another_model(self._server, self._context, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A text to write."""

    sample: int  # number of the validation sample that gives the prefix
    prefix: Int64Array
    n_tokens: int  # to write
    seed: int


def _texts(context: RecipeContext) -> list[Int64Array]:
    """Token ids of the first data set's validation samples. Raises: SweepError: they have pictures."""
    samples = held_out(context)[0].samples
    if any(sample.pictures for sample in samples):
        raise SweepError(
            "The validation samples have pictures, and a prompt of token ids carries none. "
            "Give texts to validate on: validation.captions_path=FILE."
        )
    return [sample.token_ids for sample in samples]


def _check_structure(context: RecipeContext, server: Server) -> None:
    """Compare the served checkpoint with the recipe's model, where it lies on this machine, too.

    Raises: SweepError: it has other linears.
    """
    if server.root is None or not Path(server.root).is_absolute() or not (Path(server.root) / "config.json").is_file():
        return
    if Model(Path(server.root)).configured_linears != context.model.structure.linears:
        raise _another_model(server, context, f"{server.root} has other linears")


def _another_model(server: Server, context: RecipeContext, why: str) -> SweepError:
    recipe = context.recipe
    return SweepError(
        f"{server.url} serves another model under the name {server.model!r} than {recipe.model}, which "
        f"{recipe.name} is for: {why}. Serve what `sweep export` makes of the recipe."
    )


def _seed(text: Int64Array, turn: int) -> int:
    """Follows from a sample's content, so that the same command gives the same texts; 31 bits."""
    digest = hashlib.sha256(f"{turn}:".encode() + text.tobytes()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _ratio_interval(served: FloatArray, measured: FloatArray, seed: str) -> tuple[float, float]:
    low, high = bootstrap_interval(served[None], measured, seed)[:, 0]
    return float(low), float(high)


def _figure(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.4g} ({interval[0]:.3g} to {interval[1]:.3g})"
