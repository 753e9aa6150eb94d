"""How well gradient scores rank layer groups by their KL on chats: a real model, scored on chats and on glosses.

The model writes 96 answers itself (at temperature 1, up to 32 tokens) to questions below. 64 of these chats are
scored, with the loss on their answers; so are 64 of the bundled glosses, with the loss on all tokens. On the other 32
the KL divergence is measured, at their answers, with one layer group quantized at a time; static ranges of inputs are
those of the samples that the KL is measured on. On a CPU every fourth decoder layer is scored and measured: 28 of the
120 layer groups of SmolLM2-135M-Instruct, under four formats, in a quarter of an hour on two cores; on a GPU all are.

python -m tests.bench.chat MODEL_DIR [--device cuda]

prints one JSON line: Spearman's rank correlation of predicted and measured KL, and the median and the 10 to 90 % range
of their ratio, by format and by the samples that were scored; those of the chats also by --draws labels that the model
draws (method=fisher).
"""

# pyright: basic

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sweep.config.compose import expand
from sweep.core.batches import Plan, Sample
from sweep.core.machine import n_cores
from sweep.core.paths import bundled_model_dir
from sweep.core.sizes import n_samples_of
from sweep.formats.format import Format
from sweep.plan.trials import recipe_of
from tests.bench.setup import report, spearman
from workers.data.batches import make_plan
from workers.data.conversations import Conversation, Message
from workers.data.samples import read_captions, text_samples
from workers.model import loading
from workers.model.processing import Processor
from workers.quant.modelopt import layer_groups
from workers.scoring.capture import capture
from workers.scoring.gradient import Engine, Job
from workers.scoring.kl import KlEngine
from workers.scoring.scores import NotFinite, Scores

FORMATS = (
    ("wint4_afp16", "w_group64"),  # hidden size 576: no multiple of 128
    ("wfp8_afp8", "default"),
    ("wint8_aint8", "recipe_match_channel_token"),
    ("wfp4_afp4", "default"),
)
QUESTIONS = (
    "What is {}?",
    "Explain {} to a child.",
    "Give me two tips about {}.",
    "Why do people care about {}?",
    "Write a short poem about {}.",
    "Where would I learn more about {}?",
)
TOPICS = (
    "a rainbow",
    "chess",
    "baking bread",
    "the moon",
    "riding a bicycle",
    "coffee",
    "gravity",
    "the internet",
    "gardening",
    "volcanoes",
    "swimming",
    "saving money",
    "sleep",
    "jazz music",
    "honey bees",
    "trains",
)
N_SCORED = 64  # chats; the others are measured
ANSWER_TOKENS = 32
ROWS = 32  # chats that are written side by side


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, and the layer groups and formats that are compared."""

    model: loading.PreTrainedModel
    groups: dict[str, tuple[str, ...]]  # modules by the group's name
    formats: dict[str, Format]

    @property
    def modules(self) -> list[str]:
        """Of all groups."""
        return [name for modules in self.groups.values() for name in modules]

    def jobs(self, plan: Plan) -> list[Job]:
        """Each format on all samples of a plan."""
        sizes = {plan.size: n_samples_of(plan.size)}
        return [Job(name=name, format=each, sizes=sizes) for name, each in self.formats.items()]


def questions() -> list[Conversation]:
    """All questions, in a fixed random order: those that are scored and those that are measured are of one kind."""
    texts = [question.format(topic) for question in QUESTIONS for topic in TOPICS]
    random.Random(0).shuffle(texts)
    messages = [Message(role="user", parts=(text,)) for text in texts]
    return [Conversation(messages=(message,), origin=message.text) for message in messages]


@torch.no_grad()
def continued(model: Any, prompts: list[torch.Tensor], n_tokens: int) -> np.ndarray:
    """What the model writes after each prompt at temperature 1: [prompts, tokens], with the one that ends a text."""
    width = max(map(len, prompts))
    tokens = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    written = model.generate(
        input_ids=tokens.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=n_tokens,
    )
    return written[:, width:].cpu().numpy()


def until_end(model: Any, written: np.ndarray) -> tuple[list[int], bool]:
    """The tokens before the one that ends the text, and whether the text was cut before there was one."""
    ends = np.isin(written, np.ravel(model.generation_config.eos_token_id))
    is_cut = not ends.any()
    return (written if is_cut else written[: int(ends.argmax())]).tolist(), is_cut


def answered(model: Any, processor: Processor, asked: list[Conversation]) -> list[Sample]:
    """The chats with the model's own answers, of which the tokens are predicted."""
    torch.manual_seed(0)
    found: list[Sample] = []
    for start in range(0, len(asked), ROWS):
        some = asked[start : start + ROWS]
        prompts = [torch.from_numpy(processor.prompt(each, [], max_tokens=1024).token_ids) for each in some]
        for conversation, written in zip(some, continued(model, prompts, ANSWER_TOKENS), strict=True):
            answer, is_cut = until_end(model, written)
            reply = Message(role="assistant", parts=(processor.decode(answer),))
            chat = Conversation(messages=(*conversation.messages, reply), origin=conversation.origin)
            found.append(processor.sample(chat, [], loss="answers", max_tokens=1024, is_cut=is_cut))
    return found


def subject(model: loading.PreTrainedModel) -> Subject:
    """Every decoder layer under the formats, on a CPU every fourth."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: int(name.split("layers.")[1].split(".")[0]) for name in linears if ".layers." in name}
    chosen = {name: linears[name] for name, layer in layers.items() if layer % 4 == 3 or model.device.type == "cuda"}
    formats: dict[str, Format] = {}
    for pair, granularity in FORMATS:
        point = expand([f"quant_pair={pair}", f"quant_granularity={granularity}"], multirun=False).points[0]
        formats[f"{pair}/{granularity}"] = recipe_of(point).format
    return Subject(model=model, groups=layer_groups(chosen), formats=formats)


def values(found: list[Scores] | None) -> list[float]:
    """The score of each job."""
    assert found is not None
    return [next(iter(scores.values())).score for scores in found if not isinstance(scores, NotFinite)]


def predicted_kl(bench: Subject, plan: Plan, draws: int | None = None) -> np.ndarray:
    """By the gradients on a plan's samples: [groups, formats], nats per prediction."""
    rows, engine, jobs = (
        capture(bench.model, plan.segments, bench.modules, draws),
        Engine(bench.model.device),
        bench.jobs(plan),
    )
    scores: list[list[float]] = []
    for modules in bench.groups.values():
        weights = {name: bench.model.get_parameter(f"{name}.weight").detach() for name in modules}
        scores.append(values(engine.score_group(weights, rows, jobs)()))
    return np.array(scores) / (2 * plan.n_predictions(plan.size))


def measured_kl(bench: Subject, plan: Plan) -> np.ndarray:
    """With one group quantized: [groups, formats], nats per prediction."""
    engine, jobs = KlEngine(bench.model, plan.segments, bench.modules), bench.jobs(plan)
    scores = [values(engine.score_group(modules, jobs)()) for modules in bench.groups.values()]
    return np.array(scores) / plan.n_predictions(plan.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--draws", type=int, default=8)
    args = parser.parse_args()
    path, device = args.model, torch.device(args.device)
    torch.set_num_threads(n_cores())
    model = loading.load(path, dtype=torch.float32, device=args.device)
    bench, seconds, started = subject(model), dict[str, float](), time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    chats = answered(model, Processor(path, None), questions())
    lap("answers")
    glosses = read_captions(bundled_model_dir() / "wordnet_glosses.txt", N_SCORED)
    scored = {
        "chats": make_plan(chats[:N_SCORED], packed=True),
        "glosses": make_plan(text_samples(loading.tokenize(path, glosses), 512), packed=True),
    }
    predicted = {name: predicted_kl(bench, plan) for name, plan in scored.items()}
    lap("scores")
    predicted["chats, fisher"] = predicted_kl(bench, scored["chats"], args.draws)
    lap("projections")
    other = make_plan(chats[N_SCORED:], packed=True)
    measured = measured_kl(bench, other)
    lap("kl")
    figures = {
        label: {
            name: {
                "spearman": round(spearman(kl[:, index], measured[:, index]), 4),
                "median_ratio": float(f"{np.median(kl[:, index] / measured[:, index]):.3g}"),
                "ratio_10_90": [
                    float(f"{each:.3g}") for each in np.quantile(kl[:, index] / measured[:, index], [0.1, 0.9])
                ],
            }
            for name, kl in predicted.items()
        }
        for index, label in enumerate(bench.formats)
    }
    counts = {name: plan.n_predictions(plan.size) for name, plan in {**scored, "measured": other}.items()}
    report(
        "chat",
        device,
        {
            "groups": len(bench.groups),
            "draws": args.draws,
            "predictions": counts,
            "formats": figures,
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
