"""A language model that is divided over two workers from the moment it is loaded: memory, steps and ranking.

Its layers are too large for DeepSpeed to keep whole on every worker, unlike those of the other tests.
"""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from support.parity import MAX_TOKENS, parity, phases, settings
from support.ports import free_port
from support.two_workers import join_workers, joined
from transformers import AutoModelForCausalLM, LlamaConfig

from cllm4rec.data.documents import Kind
from cllm4rec.metrics.protocol import Validation
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.stock_backbone import pretrained_backbone
from cllm4rec.training import loop, zero3
from cllm4rec.training.loop import Shard

pytestmark = pytest.mark.ray
NUM_WORKERS = 2
SHAPE = LlamaConfig(
    vocab_size=300, hidden_size=512, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=8,
    max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, pad_token_id=None,
)  # fmt: skip


class PeakMemory:
    """The most memory that this process has taken since the start of a block, besides file pages, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._before = self.peak = self._now()
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()
        self.peak -= self._before

    def _watch(self) -> None:
        while not self._is_done.wait(0.005):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) << 10


def shard_of(rank: int) -> Shard:
    """Worker 0 has nine users and worker 1 has three: its last steps and passes have no users of its own."""
    users = np.arange(9) if rank == 0 else np.arange(9, 12)
    documents = parity().documents.of_kinds([Kind.INTERACTIONS])
    histories = parity().world.histories.take(users)
    return Shard(documents.take(np.flatnonzero(np.isin(documents.user, users))), Validation(histories))


def work(rank: int, port: int, folder: Path) -> None:
    join_workers(rank, NUM_WORKERS, port)
    import deepspeed  # noqa: F401 - not counted

    def make_model() -> CLLM4Rec:
        is_divided = zero_stage == 3
        backbone = pretrained_backbone(str(folder / "stock"), None, MAX_TOKENS, None if is_divided else torch.float32)
        return CLLM4Rec(backbone, parity().token_space, std=0.1, residual=True)

    zero_stage = 3
    with PeakMemory() as memory:
        zero3.divide(make_model(), {})
    results: dict = {"loading": memory.peak}
    for zero_stage in (3, 2):
        log: list[dict] = []
        phase = dataclasses.replace(phases()[1], reads=("interactions",), epochs=1, collaborative_from_content=False)
        # A norm that is never reached: user tables are stepped alike with and without ZeRO-3.
        config = settings(
            engine="deepspeed",
            zero_stage=zero_stage,
            micro_batch_tokens=MAX_TOKENS,
            gradient_clipping=1e9,
        )
        with PeakMemory() as memory:
            weights = loop.train(make_model, parity().prompts, [phase], shard_of(rank), config, log=log.append)
        results[zero_stage] = {"weights": joined(weights), "peak": memory.peak, "log": log}
    torch.save(results, folder / f"worker-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("workers")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).save_pretrained(folder / "stock")
    with pytest.MonkeyPatch.context() as patch:
        # The C library returns every block from this size on to the system at once, so that memory in use is what counts.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 18))
        torch.multiprocessing.spawn(work, (free_port(), folder), nprocs=NUM_WORKERS)
    return [torch.load(folder / f"worker-{rank}.pt", weights_only=False) for rank in range(NUM_WORKERS)]


def size_of_backbone() -> int:
    with torch.device("meta"):
        return 4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_config(SHAPE).parameters())


def test_no_worker_ever_holds_the_whole_language_model(workers):
    """Half of it is a worker's share, and two of 24 layers are gathered; activations and DeepSpeed take as much again."""
    size = size_of_backbone()
    for worker in workers:
        assert worker["loading"] < 0.65 * size
        assert worker[3]["peak"] < 1.2 * size < 1.6 * size < worker[2]["peak"]


def test_steps_and_validation_are_those_of_zero_2(workers):
    divided, whole = workers[0][3], workers[0][2]
    for name, weight in whole["weights"].items():
        assert torch.allclose(divided["weights"][name], weight, atol=1e-5), name
        assert torch.equal(divided["weights"][name], workers[1][3]["weights"][name])
    (found,), (expected,) = (
        [entry["validation_ndcg@100"] for entry in result["log"] if entry["event"] == "epoch"]
        for result in (divided, whole)
    )
    assert found == pytest.approx(expected, abs=1e-3)
