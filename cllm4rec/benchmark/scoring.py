"""Scoring whole users, ours beside the reference: from histories to the 20 best items."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np

from cllm4rec.benchmark.corpora import Corpora
from cllm4rec.benchmark.figures import Row, ratio, row, seconds_of
from cllm4rec.benchmark.reference import BATCH, Reference
from cllm4rec.benchmark.training import Setting
from cllm4rec.benchmark.work import Work
from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged, no_values
from cllm4rec.model.backbone import Backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.ranking import Ranker
from cllm4rec.scoring.scorer import Scorer

K = 20


def scoring(
    corpora: Corpora, backbone: Backbone, setting: Setting, rate: Callable[[], float], say: Callable[[str], None]
) -> Row:
    """Users a second of the Scorer in bf16 and of the reference. `backbone` is in fp32 and stays so.

    rate: tells the machine's bf16 rate of the moment, FLOP/s; asked after every go.
    """
    corpus = corpora.histories
    users = np.random.default_rng(setting.seed).permutation(corpus.num_users)[: setting.batch_users]
    histories = corpus.histories.take(users)

    model = CLLM4Rec(copy.deepcopy(backbone), corpus.tokens, seed=setting.seed)
    model.train_only(())
    model.eval()
    model.use_bf16()
    model.to(setting.device)
    scorer = Scorer(
        Ranker(model, corpora.prompts, setting.max_tokens), _catalog(corpus.num_users, corpus.num_items), ""
    )
    seconds, rates = [], []
    for number in range(setting.reference_steps):
        seconds += seconds_of(lambda: scorer.top_k(users, histories, K), 1, warm_up=int(number == 0))
        rates.append(rate())
    lengths = histories.lengths + corpora.prompts.overhead()
    flops = Work.of(model).scoring(lengths)
    ours = row(
        {
            "users_per_s": [len(users) / one for one in seconds],
            "tokens_per_s": [float(lengths.sum()) / one for one in seconds],
            "useful_flops_per_s": [flops / one for one in seconds],
            "flops_share": [flops / one / fastest for one, fastest in zip(seconds, rates, strict=True)],
        }
    )
    reference = _reference(corpora, backbone, users, histories, setting)
    say(f"scoring: {ours['users_per_s']:,.0f} users/s, {ours['useful_flops_per_s'] / 1e9:,.0f} GFLOP/s")
    return ours | {
        "vs_reference": ratio(ours, reference, "users_per_s"),
        "reference": reference,
        "corpus": corpus.name,
    }


def _reference(
    corpora: Corpora, backbone: Backbone, users: np.ndarray[tuple[int], np.dtype[np.int64]], histories: Ragged,
    setting: Setting,
) -> Row:  # fmt: skip
    tokens = corpora.histories.tokens
    reference = Reference(CLLM4Rec(backbone, tokens, seed=setting.seed).to(setting.device))
    rates = []
    for number in range(setting.reference_steps + 1):
        rows = np.arange(number * BATCH, (number + 1) * BATCH)
        seen = histories.take(rows)

        def rank(rows: np.ndarray[tuple[int], np.dtype[np.int64]] = rows, seen: Ragged = seen) -> None:
            prompts = corpora.prompts.recommendation(tokens, users[rows], seen, no_values(len(rows)))
            reference.top_k(prompts, seen, K).cpu()

        rates += [BATCH / one for one in seconds_of(rank, 1, warm_up=int(number == 0))]
    return row({"users_per_s": rates[1:]})


def _catalog(num_users: int, num_items: int) -> Catalog:
    return Catalog([str(user) for user in range(num_users)], [str(item) for item in range(num_items)])
