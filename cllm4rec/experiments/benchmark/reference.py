"""The reference implementation of the benchmark: a straightforward one, without packing or mixed precision.

Each batch holds 20 documents, padded to the longest one, in fp32. Prompt and main text are two forward passes with a
key-value cache. Logits are computed at all positions, targets are dense, and Adam updates whole tables. Ranking sorts all
scores. The loss equals the project's loss (a test compares them), so both implementations do the same task.

Shapes: D documents, T tokens of the longest, M tokens of all main texts, K hidden size, V rows of a head, J items.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import TEXT_KINDS, Documents, Kind
from cllm4rec.model.cllm4rec import CLLM4Rec

BATCH = 20


@dataclasses.dataclass(frozen=True)
class Reference:
    """A GPT-2-like model of the project in the reference implementation. All documents of a call have the same kind."""

    model: CLLM4Rec

    @property
    def device(self) -> torch.device:
        return self.model.collaborative_items.device

    def optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam([table for table in self.model.tables().values() if table.requires_grad], learning_rate)

    def step(self, documents: Documents, lambda_c: float, optimizer: torch.optim.Optimizer) -> float:
        """One optimizer step on one batch; returns the loss."""
        optimizer.zero_grad(set_to_none=False)
        loss = self.loss(documents, lambda_c) / len(documents)
        torch.autograd.backward(loss)
        optimizer.step()
        return float(loss.detach())

    def loss(self, documents: Documents, lambda_c: float) -> Tensor:
        """-log p of main texts or targets + (lambda_c / 2) penalty, summed over documents (Eq. 7 to 10)."""
        kind = Kind(int(documents.kind[0]))
        hidden_DTK = self._hidden(documents, is_text=kind in TEXT_KINDS)
        head_VK = self.model.backbone.word_head.table_NK if kind in TEXT_KINDS else self.model.collaborative_items
        log_p_DTV = torch.log_softmax(hidden_DTK @ head_VK.T, dim=2)
        likelihood = (log_p_DTV * self._dense_targets(documents, log_p_DTV)).sum()
        return 0.5 * lambda_c * self._penalty(documents) - likelihood

    @torch.no_grad()
    def top_k(self, prompts: Documents, seen: Ragged, k: int) -> Tensor:
        """The k best unseen items for each recommendation prompt."""
        hidden_DTK = self._hidden(prompts, is_text=False)
        logits_DTJ = hidden_DTK @ self.model.collaborative_items.T
        last = self._tensor(prompts.prompt.lengths - 1)
        scores_DJ = torch.softmax(logits_DTJ[self._tensor(np.arange(len(prompts))), last], dim=1)
        scores_DJ[self._tensor(seen.rows), self._tensor(seen.values)] = -1.0
        return scores_DJ.argsort(dim=1, descending=True, stable=True)[:, :k]

    def _hidden(self, documents: Documents, is_text: bool) -> Tensor:
        """Hidden states of prompt and main text, concatenated; both are padded to their longest."""
        prompt_DT, prompt_mask_DT = _padded(documents.prompt, self.device)
        main_DT, main_mask_DT = _padded(documents.main, self.device)
        run: Any = self.model.backbone.model.base_model
        first = run(
            inputs_embeds=self._embed(prompt_DT, is_text),
            attention_mask=prompt_mask_DT,
            position_ids=_places(prompt_DT),
            use_cache=True,
        )
        if not len(documents.main.values):
            hidden_DTK: Tensor = first.last_hidden_state
            return hidden_DTK
        second = run(
            inputs_embeds=self._embed(main_DT, is_text),
            attention_mask=torch.cat([prompt_mask_DT, main_mask_DT], dim=1),
            position_ids=_places(main_DT) + self._tensor(documents.prompt.lengths)[:, None],
            past_key_values=first.past_key_values,
        )
        return torch.cat([first.last_hidden_state, second.last_hidden_state], dim=1)

    def _embed(self, token_DT: Tensor, is_text: bool) -> Tensor:
        """The embedding of each token; the unknown user and padding (-1) are zero."""
        model, space = self.model, self.model.token_space
        users, items = (
            (model.content_users, model.content_items)
            if is_text
            else (model.collaborative_users, model.collaborative_items)
        )
        embedding_DTK = torch.zeros(*token_DT.shape, model.backbone.width, device=self.device)
        tables = (
            (model.backbone.word_embeddings, 0, space.num_words),
            (users, space.num_words, space.num_users),
            (items, space.num_words + space.num_users, space.num_items),
        )
        for table, first, num_rows in tables:
            is_inside = (token_DT >= first) & (token_DT < first + num_rows)
            embedding_DTK[is_inside] = table[token_DT[is_inside] - first]
        return embedding_DTK

    def _dense_targets(self, documents: Documents, like_DTV: Tensor) -> Tensor:
        """1 for the rows of the head that a position must predict, else 0."""
        target_DTV = torch.zeros_like(like_DTV)
        last = documents.prompt.lengths - 1
        if documents.kind[0] == Kind.RECOMMENDATION:
            target = documents.target
            target_DTV[target.rows, last[target.rows], target.values] = 1.0
            return target_DTV
        # The last position of the prompt predicts the first main token; each main token predicts the next.
        main, longest_prompt = documents.main, int(documents.prompt.lengths.max())
        position_M = np.where(main.places == 0, last[main.rows], main.places + longest_prompt - 1)
        first = 0 if documents.kind[0] != Kind.INTERACTIONS else int(self.model.token_space.item_token(0))
        target_DTV[main.rows, position_M, main.values.astype("int64") - first] = 1.0
        return target_DTV

    def _penalty(self, documents: Documents) -> Tensor:
        """Squared distance between the two embeddings, summed over the distinct IDs of each document."""
        model, space = self.model, self.model.token_space
        total = torch.zeros((), device=self.device)
        for row in range(len(documents)):
            ids = {*documents.prompt[row].tolist(), *documents.main[row].tolist()}
            ids |= {int(space.item_token(item)) for item in documents.target[row]}
            for token in ids:
                if space.num_words <= token < space.num_words + space.num_users:
                    user = token - space.num_words
                    total = total + (model.collaborative_users[user] - model.content_users[user]).square().sum()
                elif token >= space.num_words + space.num_users:
                    item = int(space.item_index(token))
                    total = total + (model.collaborative_items[item] - model.content_items[item]).square().sum()
        return total

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _padded(tokens: Ragged, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-aligned tokens padded with -1, and the mask of the real ones."""
    longest = int(tokens.lengths.max())
    token_DT = torch.full((len(tokens), longest), -1)
    token_DT[tokens.rows, tokens.places] = torch.from_numpy(tokens.values.astype("int64"))
    mask_DT = torch.arange(longest) < torch.from_numpy(tokens.lengths)[:, None]
    return token_DT.to(device), mask_DT.long().to(device)


def _places(token_DT: Tensor) -> Tensor:
    return torch.arange(token_DT.shape[1], device=token_DT.device).expand_as(token_DT)
