"""Speed of scoring, ours and the reference: from histories to the 20 best items."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.experiments.benchmark.corpora import Corpora
from cllm4rec.experiments.benchmark.figures import Figures, ratio, repeats, seconds_of, summarize
from cllm4rec.experiments.benchmark.reference import BATCH, Reference
from cllm4rec.experiments.benchmark.training import Setting
from cllm4rec.experiments.benchmark.work import Work
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.ranker import Ranker
from cllm4rec.scoring.scorer import Scorer

K = 20
_NUM_PROBE_USERS = 256
"""Users of the probe that estimates how fast the machine is."""


def scoring(
    corpora: Corpora, backbone: Backbone, setting: Setting, rate: Callable[[], float], say: Callable[[str], None]
) -> Figures:
    """Users per second of the Scorer and of the reference. `backbone` is in fp32 and is not changed.

    rate: measures the machine's current rate in `setting.precision`, FLOP/s; called after each repetition. On a slow machine
    a repetition has fewer users than `setting.batch_users`.
    """
    corpus = corpora.histories
    users = np.random.default_rng(setting.seed).permutation(corpus.num_users)[: setting.batch_users]

    model = CLLM4Rec(copy.deepcopy(backbone), corpus.token_space, seed=setting.seed)
    model.train_only(())
    model.eval()
    model.compute_in(setting.precision)
    model.to(setting.device)
    scorer = Scorer(
        Ranker(model, corpora.prompts, setting.max_tokens), _catalog(corpus.num_users, corpus.num_items), ""
    )
    probe_users = users[:_NUM_PROBE_USERS]
    (probe_s,) = seconds_of(lambda: scorer.top_k(probe_users, corpus.histories.take(probe_users), K), 1)
    affordable = int(_NUM_PROBE_USERS * setting.seconds / setting.reference_steps / probe_s)
    users = users[: max(_NUM_PROBE_USERS, affordable)]
    histories = corpus.histories.take(users)
    seconds, rates = [], []
    for counts in repeats(setting.reference_steps, setting.seconds, warm_up=1):
        (duration,) = seconds_of(lambda: scorer.top_k(users, histories, K), 1, warm_up=0)
        if counts:
            seconds.append(duration)
            rates.append(rate())
    lengths = histories.lengths + corpora.prompts.overhead()
    flops = Work.of(model).scoring(lengths)
    ours = summarize(
        {
            "users_per_s": [len(users) / duration for duration in seconds],
            "tokens_per_s": [float(lengths.sum()) / duration for duration in seconds],
            "useful_flops_per_s": [flops / duration for duration in seconds],
            "flops_share": [flops / duration / peak for duration, peak in zip(seconds, rates, strict=True)],
        }
    )
    reference = _reference(corpora, backbone, users, setting)
    say(f"scoring: {ours['users_per_s']:,.0f} users/s, {ours['useful_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    return ours | {
        "users": len(users),
        "vs_reference": ratio(ours, reference, "users_per_s"),
        "reference": reference,
        "corpus": corpus.name,
    }


def _reference(
    corpora: Corpora, backbone: Backbone, users: np.ndarray[tuple[int], np.dtype[np.int64]], setting: Setting
) -> Figures:
    token_space = corpora.histories.token_space
    reference = Reference(CLLM4Rec(backbone, token_space, seed=setting.seed).to(setting.device))
    rates = []
    for number, counts in enumerate(repeats(setting.reference_steps, setting.seconds, warm_up=1)):
        batch = users[number * BATCH : (number + 1) * BATCH]
        seen = corpora.histories.histories.take(batch)

        def rank(batch: Any = batch, seen: Ragged = seen) -> None:
            prompts = corpora.prompts.recommendation(token_space, batch, seen, Ragged.empty(len(batch)))
            reference.top_k(prompts, seen, K).cpu()

        (duration,) = seconds_of(rank, 1, warm_up=0)
        if counts:
            rates.append(len(batch) / duration)
    return summarize({"users_per_s": rates})


def _catalog(num_users: int, num_items: int) -> Catalog:
    return Catalog([str(user) for user in range(num_users)], [str(item) for item in range(num_items)])
