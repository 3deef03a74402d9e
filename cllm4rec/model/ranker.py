"""Rank the whole catalog for users from their histories: one forward pass each, no candidates, no generation.

The one implementation behind validation, the batch job and the endpoint. A user's answer is bit for bit the same alone or
in any batch: prompts stand end to end in passes of one size, filled up with padding, and attention takes each by itself in
a number of blocks that depends on its length alone. So each slot is a row of the same products whoever else is there.

Lengths: B users, J items, K list length (hidden size in `hidden_BK`).
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged, no_values
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Batch, Packer, PairPacker
from cllm4rec.model.topk import stable_topk, unpack_keys

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

Pass = tuple[IntArray, Batch, IntArray]
"""Documents (rows of all), how they are laid out, and the slots whose hidden states answer for them."""

_PASS_TOKENS = {torch.bfloat16: 384, torch.float32: 192}
"""On a CPU. In float32 more slots bring 3 % and double the time of a lone request."""
_GPU_PASS_TOKENS = 8192
"""On an H200 with GPT-2 small's shape 8,192 slots rank 16,500 users/s and 2,048 rank 7,600, and a lone request takes 15 ms
instead of 14; 16,384 rank 20,300 users/s and take 31 ms (docs/gpu.md)."""
_PASS_VALUES = 1 << 17
_MOST_PASS_TOKENS = 1024
_COLUMNS_STEP = 8
_HEAD_ROWS = 64
_HEAD_ITEMS = 65_536


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model with the prompt it is asked by. `interactions` asks the pretrained model (the paper's LLM-PreRec)."""

    model: CLLM4Rec
    prompts: Prompts
    max_tokens: int
    prompt: Literal["interactions", "recommendation"] | None = "recommendation"

    @property
    def token_space(self) -> TokenSpace:
        return self.model.token_space

    @property
    def pass_tokens(self) -> int:
        """Slots of a pass, or the next multiple that a long prompt fits. A single request computes as many.

        Of a narrow model more, up to 1,024: what a pass costs besides its products would cost more than these.
        """
        model = self.model
        if model.collaborative_items.device.type != "cpu":
            return _GPU_PASS_TOKENS
        return max(_PASS_TOKENS[model.precision], min(_MOST_PASS_TOKENS, _PASS_VALUES // model.backbone.width))

    @torch.inference_mode()
    def top_k(self, users: IntArray, histories: Ragged, exclude: Ragged, k: int) -> tuple[IntArray, FloatArray]:
        """The k best items of each user, best first, ties by lower index; (B, k) indices and logits.

        users: rows, -1 where unknown. histories: item indices that are read (order does not matter). exclude: item
        indices that may not be recommended. Where fewer than k items remain: -1 and -inf.
        """
        return self.best_items(self.encode_users(users, histories), exclude, k)

    @torch.inference_mode()
    def best_items(
        self, hidden_BK: Tensor, exclude: Ragged, k: int, bias_J: Tensor | None = None
    ) -> tuple[IntArray, FloatArray]:
        """`top_k` from the hidden states on. bias_J: added to everyone's logits, -inf where nobody may have an item."""
        items = np.empty((len(hidden_BK), k), np.int64)
        scores = np.empty((len(hidden_BK), k), np.float32)
        for begin in range(0, len(hidden_BK), _HEAD_ROWS):
            rows = np.arange(begin, min(begin + _HEAD_ROWS, len(hidden_BK)))
            items[rows], scores[rows] = self._best_items(hidden_BK[rows], exclude.take(rows), k, bias_J)
        return items, scores

    @torch.inference_mode()
    def encode_users(self, users: IntArray, histories: Ragged) -> Tensor:
        """The hidden state after each user's prompt, (B, K) in float32: what `best_items` ranks by."""
        documents = self._documents(users, histories)
        device = self.model.collaborative_items.device
        hidden_BK = torch.zeros(len(users), self.model.backbone.width, device=device)
        passes = self._pair_passes(documents) if self.model.backbone.pairs else self._passes(documents)

        @torch.inference_mode()
        def run(one: Pass) -> None:
            rows, batch, slots = one
            hidden_SK = self.model.hidden_states(batch_to_device(batch, device, batch_invariant=True))
            hidden_BK[rows] = self.model.queries(hidden_SK[slots].float())

        if device.type == "cpu":
            _run_in_threads(run, passes)
        else:
            for one in passes:
                run(one)
        return hidden_BK

    def _documents(self, users: IntArray, histories: Ragged) -> Documents:
        items = self._canonical(histories)
        if self.prompt == "interactions":
            return self.prompts.interactions(self.token_space, users, items)
        return self.prompts.recommendation(self.token_space, users, items, no_values(len(users)))

    def _canonical(self, histories: Ragged) -> Ragged:
        """The last items that fit the prompt, without repeats, ascending: training shuffles, so order carries nothing."""
        most = self.max_tokens - self.prompts.overhead()
        from_end = histories.lengths[histories.rows] - histories.places
        recent = histories.where(from_end <= most)
        order = np.lexsort((recent.values, recent.rows))
        values, rows = recent.values[order], recent.rows[order]
        is_new = np.ones(len(values), bool)
        is_new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
        return Ragged.from_rows(values[is_new], rows[is_new], len(histories))

    def _passes(self, documents: Documents) -> Iterator[Pass]:
        """Documents end to end in one row, as many as fit: neighbors of similar length, which attention takes together."""
        lengths = documents.lengths
        sizes = -(-lengths // self.pass_tokens) * self.pass_tokens
        order = np.argsort(lengths, kind="stable")
        begin = 0
        while begin < len(order):
            size = int(sizes[order[begin]])
            next_ones = order[begin : begin + size]
            ends = np.cumsum(lengths[next_ones])
            count = int(((ends <= size) & (sizes[next_ones] == size)).sum())
            rows = next_ones[:count]
            yield rows, Packer(self.token_space, size, size).layout(documents.take(rows)), ends[:count] - 1
            begin += count

    def _pair_passes(self, documents: Documents) -> Iterator[Pass]:
        """A document a row, in rows of one width."""
        columns = -(-documents.lengths // _COLUMNS_STEP) * _COLUMNS_STEP
        for width in np.unique(columns).tolist():
            num_rows = max(1, self.pass_tokens // width)
            members = np.flatnonzero(columns == width)
            for begin in range(0, len(members), num_rows):
                rows = members[begin : begin + num_rows]
                yield rows, *self._pair_layout(documents.take(rows), num_rows, width)

    def _pair_layout(self, documents: Documents, num_rows: int, width: int) -> tuple[Batch, IntArray]:
        every = np.arange(len(documents))
        packer = PairPacker(self.token_space, 0, self.model.backbone.start_token)
        if self.prompt == "recommendation":
            return packer.layout(documents, (num_rows, width, 1)), every
        # The decoder reads all but the last main token: one more makes it read the whole history.
        asked = Ragged(np.zeros(len(documents), np.int32), np.arange(len(documents) + 1))
        longer = dataclasses.replace(documents, main=Ragged.interleave(documents.main, asked))
        prompt_width = int(documents.prompt.lengths[0])
        return packer.layout(longer, (num_rows, prompt_width, width)), every * width + documents.main.lengths

    def _best_items(
        self, hidden_BK: Tensor, exclude: Ragged, k: int, bias_J: Tensor | None
    ) -> tuple[IntArray, FloatArray]:
        num_users, num_items = len(hidden_BK), self.token_space.num_items
        fixed_BK = torch.nn.functional.pad(hidden_BK, (0, 0, 0, _HEAD_ROWS - num_users))
        best: Tensor | None = None
        for begin in range(0, num_items, _HEAD_ITEMS):
            table_JK = self.model.collaborative_items[begin : begin + _HEAD_ITEMS].float()
            logits_BJ = (fixed_BK @ table_JK.T)[:num_users]
            if bias_J is not None:
                logits_BJ += bias_J[begin : begin + _HEAD_ITEMS]
            inside = (exclude.values >= begin) & (exclude.values < begin + _HEAD_ITEMS)
            rows = torch.from_numpy(exclude.rows[inside]).to(logits_BJ.device)
            columns = torch.from_numpy(exclude.values[inside] - begin).to(logits_BJ.device)
            logits_BJ[rows, columns] = -torch.inf
            keys = stable_topk(logits_BJ, k, begin)
            keys = keys if best is None else torch.cat([best, keys], dim=1)
            best = keys.topk(min(k, keys.shape[1]), dim=1).values
        assert best is not None, "a catalog has at least one item"
        return unpack_keys(best, k)


def _run_in_threads(run: Callable[[Pass], None], passes: Iterator[Pass]) -> None:
    """Run a pass in each of torch's threads at a time, each computed by one of them alone.

    So products have the same bits whatever the number of threads; and a thread for each pass is a third faster than all
    of them for each product (DECISIONS.md, "Speed").
    """
    taking = threading.Lock()

    def take_and_run() -> None:
        while True:
            with taking:
                one = next(passes, None)
            if one is None:
                return
            run(one)

    count = torch.get_num_threads()
    for done in [_threads(count).submit(take_and_run) for _ in range(count)]:
        done.result()


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch computes alone."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # what a thread asks first would replace what is set before
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, thread_name_prefix="ranking")
    for _ in range(count):
        threads.submit(start)
    started.wait()
    torch.set_num_threads(count)  # what later threads begin with is the last number anyone set
    return threads


def merged(*parts: Ragged) -> Ragged:
    """The items of several lists a user, ascending and without repeats."""
    together = Ragged.interleave(*parts)
    span = int(together.values.max(initial=0)) + 1
    distinct: Any = np.unique(together.rows * span + together.values.astype(np.int64))
    return Ragged.from_rows(distinct % span, distinct // span, len(together))
