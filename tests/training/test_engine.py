"""DeepSpeed at every ZeRO stage on two workers, compared with one process of plain torch on the same documents."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.parity import MAX_TOKENS, NARROW, parity, phases, settings
from support.ports import free_port
from support.two_workers import join_workers, joined

from cllm4rec.data.documents import Documents, Kind
from cllm4rec.metrics.protocol import Validation
from cllm4rec.training import loop
from cllm4rec.training.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from cllm4rec.training.engine import make_engine
from cllm4rec.training.loop import Shard
from cllm4rec.training.phases import Phase

pytestmark = pytest.mark.ray
ZERO_STAGES = (0, 1, 2, 3)
EPOCHS = 3
NUM_WORKERS = 2
# Every epoch is one step of all documents, so that the result cannot depend on how they are divided.
PHASE = dataclasses.replace(phases()[1], epochs=EPOCHS, collaborative_from_content=False)
BACKBONE_PHASE = Phase("backbone", ("backbone",), ("plain_texts",), 1, 1e-3)
CLIPPED = {"accumulation": 2, "gradient_clipping": 0.05}
# Several steps per epoch, so that a step reads only some users.
PARTS = {"micro_batch_rows": 6}
# A norm that is never reached changes no step, but turns row-wise steps off.
WHOLE_TABLES = {"gradient_clipping": 1e9}
WHOLE: dict = {}
# Everything that is trained beside the tables: projections of narrow tables, the residual with its bias, a LoRA adapter.
EXTENDED = {
    "form": {"id_width": NARROW, "residual": True, "adapter": True},
    "phase": dataclasses.replace(PHASE, trained=(*PHASE.trained, "adapter")),
}


def shard_of(rank: int, num_workers: int) -> Shard:
    """Worker 0 has three quarters of the users, so worker 1 runs out of documents first. User 7 has no documents."""
    world = parity()
    documents, histories = world.documents, world.world.histories
    sample = Documents.concat(
        [documents.of_kinds([Kind.INTERACTIONS]), documents.of_kinds([Kind.REVIEW]).take(np.arange(0, 320, 4))]
    )
    sample = sample.take(np.flatnonzero(sample.user != 7))
    if num_workers == 1:
        return Shard(sample, Validation(histories))
    is_own = np.isin(np.arange(40) % 4, [0, 1, 2] if rank == 0 else [3])
    return Shard(sample.take(np.flatnonzero(is_own[sample.user])), Validation(histories.take(np.flatnonzero(is_own))))


def train(rank=0, num_workers=1, phase=PHASE, resumed=None, micro_batch_rows=None, form=WHOLE, folder=None, **changes):
    """The weights of a run, its checkpoints after each epoch, and its log. folder: where checkpoints are written, too."""
    saved, log = [], []

    def save(checkpoint: Checkpoint) -> None:
        tensors = {"state": joined(checkpoint.state), "best": joined(checkpoint.best)}
        saved.append(dataclasses.replace(checkpoint, progress=dataclasses.replace(checkpoint.progress), **tensors))
        if folder is not None:
            (folder / str(len(saved))).mkdir(exist_ok=True)
            write_checkpoint(folder / str(len(saved)), checkpoint, "this run", rank, num_workers)

    weights = loop.train(
        lambda: parity().make_model(**form),
        parity().prompts,
        [phase],
        shard_of(rank, num_workers),
        settings(micro_batch_tokens=(micro_batch_rows or 100) * MAX_TOKENS, **changes),
        log=log.append,
        save=save,
        resumed=None
        if resumed is None
        else dataclasses.replace(resumed, progress=dataclasses.replace(resumed.progress)),
    )
    return {"weights": joined(weights), "saved": saved, "log": log}


def work(rank, port, folder):
    """One of two workers. All ZeRO stages run in one process, because importing DeepSpeed takes longest."""
    join_workers(rank, NUM_WORKERS, port)
    start = torch.load(folder / "start.pt", weights_only=False)
    results = {}
    for zero_stage in ZERO_STAGES:
        options = {"rank": rank, "num_workers": NUM_WORKERS, "engine": "deepspeed", "zero_stage": zero_stage}
        results[zero_stage, "clipped"] = train(**options, **CLIPPED, micro_batch_rows=24)
        results[zero_stage, "accumulated"] = train(**options, accumulation=2, micro_batch_rows=24)
        whole = results[zero_stage, "whole"] = train(**options, folder=folder / f"zero{zero_stage}")
        torch.distributed.barrier()  # each worker writes its files
        written = read_checkpoint(folder / f"zero{zero_stage}" / "1", "this run")
        results[zero_stage, "from files"] = train(**options, resumed=written)
        results[zero_stage, "whole resumed"] = train(**options, resumed=whole["saved"][0])
        extended = results[zero_stage, "extended"] = train(**options, **EXTENDED)
        results[zero_stage, "extended resumed"] = train(**options, **EXTENDED, resumed=extended["saved"][0])
        parts = results[zero_stage, "parts"] = train(**options, **PARTS)
        results[zero_stage, "parts resumed"] = train(**options, **PARTS, resumed=parts["saved"][0])
        results[zero_stage, "parts of whole tables"] = train(**options, **PARTS, **WHOLE_TABLES)
        results[zero_stage, "from torch"] = train(**options, resumed=start)
        results[zero_stage, "backbone"] = train(**options, phase=BACKBONE_PHASE)
        if zero_stage:
            offloaded = results[zero_stage, "offloaded"] = train(**options, cpu_offload=True)
            results[zero_stage, "offloaded resumed"] = train(**options, cpu_offload=True, resumed=offloaded["saved"][0])
    try:
        users_of_both = np.array([3])
        model = parity().make_model()
        model.train_only(PHASE.trained)
        make_engine(model, settings().training, 1e-2, users=users_of_both)
    except AssertionError as error:
        results["one user twice"] = str(error)
    torch.save(results, folder / f"worker-{rank}.pt")
    torch.distributed.destroy_process_group()


def work_alone(rank, port, folder):
    """A single worker with an empty folder of compiled extensions."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "compiled")
    join_workers(rank, 1, port)
    torch.save(train(engine="deepspeed"), folder / "alone.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def plain():
    torch.set_num_threads(1)
    whole = train()
    return {
        "whole": whole,
        "accumulated": whole,
        "extended": train(**EXTENDED),
        "clipped": train(**CLIPPED | {"accumulation": 1}),
        "backbone": train(phase=BACKBONE_PHASE),
    }


@pytest.fixture(scope="module")
def workers(plain, tmp_path_factory):
    """The results of both workers, by ZeRO stage and variant."""
    folder = tmp_path_factory.mktemp("workers")
    for zero_stage in ZERO_STAGES:
        (folder / f"zero{zero_stage}").mkdir()
    torch.save(plain["whole"]["saved"][0], folder / "start.pt")
    torch.multiprocessing.spawn(work, (free_port(), folder), nprocs=NUM_WORKERS)
    return [
        torch.load(folder / f"worker-{rank}.pt", weights_only=False) | {"folder": folder} for rank in range(NUM_WORKERS)
    ]


def distance(left, right) -> float:
    assert set(left) == set(right)
    return max((left[name] - right[name]).abs().max().item() for name in left)


def steps(result) -> list[dict]:
    return [entry for entry in result["log"] if entry["event"] == "step"]


def epochs(result) -> list[dict]:
    return [entry for entry in result["log"] if entry["event"] == "epoch"]


@pytest.mark.parametrize("variant", ["whole", "accumulated", "clipped", "extended", "backbone"])
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_two_workers_take_the_steps_of_one(plain, workers, zero_stage, variant):
    result = workers[0][zero_stage, variant]
    assert distance(result["weights"], plain[variant]["weights"]) < 1e-5
    assert distance(result["weights"], workers[1][zero_stage, variant]["weights"]) == 0
    assert [entry["documents"] for entry in steps(result)] == [entry["documents"] for entry in steps(plain[variant])]
    losses = [entry["loss"] for entry in steps(result)]
    assert losses == pytest.approx([entry["loss"] for entry in steps(plain[variant])], rel=1e-5)


def test_clipping_changes_the_steps(plain):
    assert distance(plain["clipped"]["weights"], plain["whole"]["weights"]) > 1e-3


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_validation_users_of_all_workers_count(plain, workers, zero_stage):
    metrics = [entry["validation_ndcg@100"] for entry in epochs(workers[0][zero_stage, "whole"])]
    assert metrics == pytest.approx([entry["validation_ndcg@100"] for entry in epochs(plain["whole"])], abs=1e-3)


@pytest.mark.parametrize("variant", ["whole", "extended", "parts"])
@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_a_resumed_worker_matches_an_uninterrupted_one(workers, zero_stage, variant):
    for worker in workers:
        resumed, uninterrupted = worker[zero_stage, f"{variant} resumed"], worker[zero_stage, variant]
        assert len(epochs(resumed)) == EPOCHS - 1
        assert distance(resumed["weights"], uninterrupted["weights"]) == 0


@pytest.mark.parametrize("zero_stage", ZERO_STAGES[1:])
def test_offloading_to_the_cpu_changes_no_step(workers, zero_stage):
    for variant in ("offloaded", "offloaded resumed"):
        assert distance(workers[0][zero_stage, variant]["weights"], workers[0][zero_stage, "whole"]["weights"]) == 0


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_row_wise_steps_on_two_workers_equal_dense_steps(workers, zero_stage):
    by_row, whole = workers[0][zero_stage, "parts"], workers[0][zero_stage, "parts of whole tables"]
    assert len(steps(by_row)) > 3 * EPOCHS
    assert distance(by_row["weights"], whole["weights"]) < 1e-5
    assert distance(by_row["weights"], workers[1][zero_stage, "parts"]["weights"]) == 0
    for left, right in zip(by_row["saved"][:-1], whole["saved"][:-1], strict=True):
        assert distance(left.state, right.state) < 1e-5


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_a_checkpoint_resumes_with_another_engine_and_number_of_workers(plain, workers, zero_stage):
    from_torch = workers[0][zero_stage, "from torch"]
    assert distance(from_torch["weights"], plain["whole"]["weights"]) < 1e-5
    written = workers[0]["folder"] / f"zero{zero_stage}" / "1"
    to_torch = train(resumed=read_checkpoint(written, "this run"))
    assert distance(to_torch["weights"], plain["whole"]["weights"]) < 1e-5
    assert distance(workers[0][zero_stage, "from files"]["weights"], workers[0][zero_stage, "whole"]["weights"]) == 0


def test_with_zero_3_no_file_of_a_checkpoint_holds_a_whole_tensor(workers):
    files = sorted((workers[0]["folder"] / "zero3" / "1").glob("state-*-of-00002.safetensors"))
    assert len(files) == NUM_WORKERS
    whole = workers[0][3, "whole"]["saved"][0].state
    for number, file in enumerate(files):
        for name, share in load_file(file).items():
            if name != "step":  # one number, which the first worker has
                assert torch.equal(share, whole[name].flatten().chunk(NUM_WORKERS)[number]), name


def test_a_user_with_documents_on_two_workers_is_an_error(workers):
    assert [worker["one user twice"] for worker in workers] == ["two workers have documents of one user"] * NUM_WORKERS


def test_a_single_worker_takes_the_same_steps_and_compiles_nothing(plain, tmp_path):
    torch.multiprocessing.spawn(work_alone, (free_port(), tmp_path), nprocs=1)
    alone = torch.load(tmp_path / "alone.pt", weights_only=False)
    assert distance(alone["weights"], plain["whole"]["weights"]) < 1e-5
    assert not list(tmp_path.glob("compiled/**/*.so"))
