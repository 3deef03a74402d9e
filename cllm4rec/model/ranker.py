"""Ranks the whole catalog for users from their histories: one forward pass, no candidate generation, no decoding.

Validation, batch scoring and the endpoint use this implementation. The result for a user is bit-identical in any batch:
prompts are packed end to end into passes of one size, filled with padding, and the attention of a prompt runs in a number of
blocks that depends only on its length. Each slot is therefore a row of products of the same shape, regardless of the rest
of the pass.

Shapes: B users, J items, K list length, D width of the ID tables, S slots of a pass.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Documents, Prompts
from cllm4rec.model.batch import TensorBatch, batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Batch, Packer, PairPacker
from cllm4rec.model.topk import stable_topk, unpack_keys
from cllm4rec.typing import Float32Array, IntArray

Pass = tuple[IntArray, Batch, IntArray]
"""Row numbers of documents, their batch, and the slot of each whose hidden state represents the user."""

_PASS_TOKENS = {torch.bfloat16: 384, torch.float32: 192}
"""Slots of a pass on a CPU. In float32 more slots gain 3 % and double the time of a single request."""
_GPU_PASS_TOKENS = 8192
"""Measured on an H200 with the shape of GPT-2 small: 8,192 slots rank 16,500 users/s and 2,048 rank 7,600; a single request
takes 15 ms instead of 14. 16,384 slots rank 20,300 users/s and take 31 ms (docs/gpu.md)."""
_PASS_VALUES = 1 << 17
_MAX_PASS_TOKENS = 1024
_COLUMNS_STEP = 8
_HEAD_ROWS = 64
_HEAD_ITEMS = 65_536


@dataclasses.dataclass(frozen=True)
class Ranker:
    """A model and the kind of prompt to query it with. The pretrained model takes `interactions` (paper: LLM-PreRec)."""

    model: CLLM4Rec
    prompts: Prompts
    max_tokens: int
    prompt: Literal["interactions", "recommendation"] | None = "recommendation"
    with_language_model: bool = True
    """False, for models with `residual`: leave out what the language model adds, to measure it."""
    encode: Callable[[Iterator[TensorBatch]], Iterator[Tensor]] | None = None
    """Batches → the hidden states of all slots of each, (S, K), in order. None: the model itself, on a CPU in threads."""

    @property
    def token_space(self) -> TokenSpace:
        return self.model.token_space

    @property
    def pass_tokens(self) -> int:
        """The number of slots of a pass. A longer prompt gets the next multiple. A single request also takes a whole pass.

        Narrow models use more slots, up to 1,024, because their fixed costs per pass would exceed the matrix products.
        """
        model = self.model
        if model.collaborative_items.device.type != "cpu":
            return _GPU_PASS_TOKENS
        return max(_PASS_TOKENS[model.precision], min(_MAX_PASS_TOKENS, _PASS_VALUES // model.backbone.width))

    @torch.inference_mode()
    def top_k(self, users: IntArray, histories: Ragged, exclude: Ragged, k: int) -> tuple[IntArray, Float32Array]:
        """The k best items of each user: (B, k) item indices and logits, descending, ties by lower index.

        users: user indices, -1 for unknown users.
        histories: item indices to read. Their order does not matter.
        exclude: item indices that may not be recommended.
        If fewer than k items remain, the list ends with -1 and -inf.
        """
        return self.best_items(self.encode_users(users, histories), exclude, k)

    @torch.inference_mode()
    def best_items(
        self,
        query_BD: Tensor,
        exclude: Ragged,
        k: int,
        bias_J: Tensor | None = None,
        divisor_J: Tensor | None = None,
    ) -> tuple[IntArray, Float32Array]:
        """`top_k` from the result of `encode_users`. bias_J: added to the logits of all users; -inf removes an item for all.
        divisor_J: by which the logits are divided before."""
        items = np.empty((len(query_BD), k), np.int64)
        scores = np.empty((len(query_BD), k), np.float32)
        for begin in range(0, len(query_BD), _HEAD_ROWS):
            rows = np.arange(begin, min(begin + _HEAD_ROWS, len(query_BD)))
            items[rows], scores[rows] = self._best_items(query_BD[rows], exclude.take(rows), k, bias_J, divisor_J)
        return items, scores

    @torch.inference_mode()
    def similar_items(
        self, items: IntArray, exclude: Ragged, k: int, bias_J: Tensor | None = None
    ) -> tuple[IntArray, Float32Array]:
        """The k items whose collaborative embeddings have the largest cosine with those of `items`; else as `best_items`."""
        length_J = self._item_lengths
        which = torch.from_numpy(items).to(length_J.device)
        direction_BD = self.model.collaborative_items[which].float() / length_J[which, None]
        return self.best_items(direction_BD, exclude, k, bias_J, length_J)

    @functools.cached_property
    def _item_lengths(self) -> Tensor:
        """Lengths of the items' collaborative embeddings; at least a tiny one, so that cosines with nothing are 0."""
        lengths_J: Tensor = torch.linalg.vector_norm(self.model.collaborative_items, dim=1, dtype=torch.float32)
        return lengths_J.clamp_min(1e-12)

    @torch.inference_mode()
    def encode_users(self, users: IntArray, histories: Ragged) -> Tensor:
        """The query after each user's prompt (`CLLM4Rec.queries`), (B, D) in float32, the input of `best_items`."""
        device = self.model.collaborative_items.device
        query_BD = torch.zeros(len(users), self.model.id_width, device=device)
        if self.with_language_model:
            self._set_queries(query_BD, self._documents(users, histories))
        elif self.model.query_bias is not None:
            query_BD += self.model.query_bias / self.model.temperature
        if self.model.residual:
            items = self._canonical(histories)
            values, offsets = (torch.from_numpy(array).to(device) for array in (items.values, items.offsets))
            query_BD += self.model.history_sums(values, offsets) / self.model.temperature
        return query_BD

    def _set_queries(self, query_BD: Tensor, documents: Documents) -> None:
        """Set each row of `query_BD` to the query of the hidden state after its document."""
        device = query_BD.device
        passes = self._pair_passes(documents) if self.model.backbone.is_encoder_decoder else self._passes(documents)

        def to_device(batch: Batch) -> TensorBatch:
            return batch_to_device(batch, device, batch_invariant=True)

        def set_rows(hidden_SK: Tensor, rows: IntArray, slots: IntArray) -> None:
            # Queries of all slots: the number of documents of a pass, and so the shape of a product, depends on the batch.
            query_BD[rows] = self.model.queries(hidden_SK.float())[slots]

        @torch.inference_mode()
        def run(ranking_pass: Pass) -> None:
            rows, batch, slots = ranking_pass
            set_rows(self.model.hidden_states(to_device(batch)), rows, slots)

        if self.encode is not None:
            for_encoding, to_set = itertools.tee(passes)
            for hidden_SK in self.encode(to_device(batch) for _, batch, _ in for_encoding):
                rows, _, slots = next(to_set)
                set_rows(hidden_SK, rows, slots)
        elif device.type == "cpu":
            _run_in_threads(run, passes)
        else:
            for ranking_pass in passes:
                run(ranking_pass)

    def _documents(self, users: IntArray, histories: Ragged) -> Documents:
        items = self._canonical(histories)
        if self.prompt == "interactions":
            return self.prompts.interactions(self.token_space, users, items)
        return self.prompts.recommendation(self.token_space, users, items, Ragged.empty(len(users)))

    def _canonical(self, histories: Ragged) -> Ragged:
        """The last items that fit into the prompt, distinct and ascending. Training shuffles them, so order has no meaning."""
        max_items = self.max_tokens - self.prompts.overhead()
        from_end = histories.lengths[histories.rows] - histories.places
        recent = histories.where(from_end <= max_items)
        order = np.lexsort((recent.values, recent.rows))
        values, rows = recent.values[order], recent.rows[order]
        is_new = np.ones(len(values), bool)
        is_new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
        return Ragged.from_rows(values[is_new], rows[is_new], len(histories))

    def _passes(self, documents: Documents) -> Iterator[Pass]:
        """Documents end to end in one row, sorted by length so that attention processes similar lengths together."""
        lengths = documents.lengths
        sizes = -(-lengths // self.pass_tokens) * self.pass_tokens
        order = np.argsort(lengths, kind="stable")
        begin = 0
        while begin < len(order):
            size = int(sizes[order[begin]])
            candidates = order[begin : begin + size]
            ends = np.cumsum(lengths[candidates])
            count = int(((ends <= size) & (sizes[candidates] == size)).sum())
            rows = candidates[:count]
            yield rows, Packer(self.token_space, size, size).layout(documents.take(rows)), ends[:count] - 1
            begin += count

    def _pair_passes(self, documents: Documents) -> Iterator[Pass]:
        """One document per row, in passes of equal width."""
        columns = -(-documents.lengths // _COLUMNS_STEP) * _COLUMNS_STEP
        for width in np.unique(columns).tolist():
            num_rows = max(1, self.pass_tokens // width)
            members = np.flatnonzero(columns == width)
            for begin in range(0, len(members), num_rows):
                rows = members[begin : begin + num_rows]
                yield rows, *self._pair_layout(documents.take(rows), num_rows, width)

    def _pair_layout(self, documents: Documents, num_rows: int, width: int) -> tuple[Batch, IntArray]:
        document_D = np.arange(len(documents))
        packer = PairPacker(self.token_space, 0, self.model.backbone.start_token)
        if self.prompt == "recommendation":
            return packer.layout(documents, (num_rows, width, 1)), document_D
        # The decoder does not read the last main token. An appended token makes it read the whole history.
        appended = Ragged(np.zeros(len(documents), np.int32), np.arange(len(documents) + 1))
        longer = dataclasses.replace(documents, main=Ragged.interleave(documents.main, appended))
        prompt_width = int(documents.prompt.lengths[0])
        return packer.layout(longer, (num_rows, prompt_width, width)), document_D * width + documents.main.lengths

    def _best_items(
        self, query_BD: Tensor, exclude: Ragged, k: int, bias_J: Tensor | None, divisor_J: Tensor | None
    ) -> tuple[IntArray, Float32Array]:
        num_users, num_items = len(query_BD), self.token_space.num_items
        padded_BD = torch.nn.functional.pad(query_BD, (0, 0, 0, _HEAD_ROWS - num_users))
        best: Tensor | None = None
        for begin in range(0, num_items, _HEAD_ITEMS):
            table_JD = self.model.collaborative_items[begin : begin + _HEAD_ITEMS].float()
            logits_BJ = (padded_BD @ table_JD.T)[:num_users]
            if divisor_J is not None:
                logits_BJ /= divisor_J[begin : begin + _HEAD_ITEMS]
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
    """Run as many passes at a time as torch has threads, each pass in a single thread.

    The products therefore have the same bits for any number of threads. One thread per pass is a third faster than all
    threads for each product (docs/decisions.md, "Speed").
    """
    lock = threading.Lock()

    def run_next_passes() -> None:
        while True:
            with lock:
                ranking_pass = next(passes, None)
            if ranking_pass is None:
                return
            run(ranking_pass)

    count = torch.get_num_threads()
    for future in [_single_threaded_pool(count).submit(run_next_passes) for _ in range(count)]:
        future.result()


@functools.cache
def _single_threaded_pool(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, in each of which torch computes with one thread."""
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # the first query in a thread would override a number that was set earlier
        torch.set_num_threads(1)
        started.wait()

    threads = ThreadPoolExecutor(count, thread_name_prefix="ranking")
    for _ in range(count):
        threads.submit(start)
    started.wait()
    torch.set_num_threads(count)  # new threads start with the number that was set last in any thread
    return threads
