"""The training loop on the parity world: it learns, resumes with identical bits, and stops cleanly."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from support.parity import ARCHITECTURES, NARROW, parity, phases, recall_at_1, settings, train, trained
from support.weights import digest_of_weights

from cllm4rec.data.documents import Documents
from cllm4rec.errors import ArtifactError, TrainingError
from cllm4rec.metrics.protocol import Validation
from cllm4rec.model.cllm4rec import DENSE, TABLES
from cllm4rec.model.ranker import Ranker
from cllm4rec.training import loop
from cllm4rec.training.checkpoints import Checkpoint, Progress, newest_valid, read_checkpoint, write_checkpoint
from cllm4rec.training.engine import RowWiseEngine, TorchEngine, make_engine
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.loop import Shard, load_parameters
from cllm4rec.training.phases import COLLABORATIVE, CONTENT, Phase, pretrain_phases


def copied(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(dataclasses.replace(checkpoint.progress), dict(checkpoint.state), dict(checkpoint.best))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_hidden_item_is_found_after_training_and_by_chance_before(architecture):
    untrained = Ranker(parity().make_model(architecture), parity().prompts, trained(architecture).max_tokens)
    assert recall_at_1(untrained) < 0.5
    assert recall_at_1(trained(architecture)) == 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_items_are_found_from_the_history_alone(architecture):
    assert recall_at_1(trained(architecture), users=np.full(40, -1)) == 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_narrow_tables_find_every_hidden_item_too(architecture):
    ranker = trained(architecture, NARROW)
    untrained = Ranker(parity().make_model(architecture, NARROW), parity().prompts, ranker.max_tokens)
    assert recall_at_1(untrained) < 0.5
    assert recall_at_1(ranker) == recall_at_1(ranker, users=np.full(40, -1)) == 1.0


@pytest.mark.parametrize("id_width", [None, NARROW])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_resumed_run_matches_uninterrupted_run(stop_after, id_width, tmp_path):
    whole, _ = train(phases(epochs=3), id_width=id_width)
    seen: list[Checkpoint] = []

    class KilledError(Exception):
        pass

    def save(checkpoint):
        seen.append(copied(checkpoint))
        if len(seen) == stop_after:
            write_checkpoint(tmp_path, checkpoint, "this run")
            raise KilledError

    with pytest.raises(KilledError):
        train(phases(epochs=3), save=save, id_width=id_width)
    resumed, log = train(phases(epochs=3), resumed=read_checkpoint(tmp_path, "this run"), id_width=id_width)
    assert sum(entry["event"] == "epoch" for entry in log) == 6 - stop_after
    assert set(resumed) == set(whole) == set(parity().make_model(id_width=id_width).own_parameters())
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


class FixedValidation(Validation):
    """A validation that returns the given value for each epoch."""

    def __init__(self, *values: float) -> None:
        super().__init__(parity().world.histories)
        self._values = iter(values)

    def metrics(self, ranked_BK):
        return {"count": 1.0, "ndcg@100": next(self._values)}


def test_the_best_epoch_is_kept_and_patience_ends_a_phase():
    phase = dataclasses.replace(phases()[2], epochs=9, patience=2)
    shard = Shard(parity().documents, FixedValidation(0.1, 0.5, 0.4, 0.45))
    weights, log = train([phase], shard=shard)
    epochs = [entry for entry in log if entry["event"] == "epoch"]
    assert [entry["best_epoch"] for entry in epochs] == [1, 2, 2, 2]
    assert [entry["stopped"] for entry in epochs] == [False, False, False, True]
    two_epochs = dataclasses.replace(phase, epochs=2)
    second, _ = train([two_epochs], shard=Shard(parity().documents, FixedValidation(0.1, 0.5)))
    assert torch.equal(weights["collaborative_items"], second["collaborative_items"])


def test_only_every_nth_epoch_and_the_last_are_validated_and_kept():
    phase = dataclasses.replace(phases()[2], epochs=5, patience=9)
    shard = Shard(parity().documents, FixedValidation(0.5, 0.1, 0.2))
    weights, log = train([phase], shard=shard, validate_every_epochs=2)
    epochs = [entry for entry in log if entry["event"] == "epoch"]
    assert [entry.get("validation_ndcg@100") for entry in epochs] == [None, 0.5, None, 0.1, 0.2]
    assert epochs[-1]["best_epoch"] == 2
    second, _ = train(
        [dataclasses.replace(phase, epochs=2)], shard=Shard(parity().documents, FixedValidation(0.1, 0.5))
    )
    assert torch.equal(weights["collaborative_items"], second["collaborative_items"])


def test_without_texts_there_is_no_warmup_and_only_histories_are_read():
    pretrain = settings().pretrain.model_copy(update={"warmup_epochs": 1, "epochs": 1, "text_fraction": 0.0})
    weights, log = train(pretrain_phases(settings().model_copy(update={"pretrain": pretrain})))
    (epoch,) = [entry for entry in log if entry["event"] == "epoch"]
    assert epoch["phase"] == "pretrain"
    assert sum(entry["documents"] for entry in log if entry["event"] == "step") == 40, "a history of each user"
    assert torch.isfinite(weights["content_items"]).all()


def test_warmup_moves_content_tables_only_and_finetuning_collaborative_ones_only():
    before = {name: table.detach().clone() for name, table in parity().make_model().tables().items()}
    warm, _ = train(phases()[:1])
    assert set(warm) == set(CONTENT)
    assert not torch.equal(warm["content_items"], before["content_items"])
    tuned, _ = train([dataclasses.replace(phases()[2], epochs=1)])
    assert set(tuned) == set(COLLABORATIVE)


@pytest.mark.parametrize(
    ("phase", "trained_too"),
    [
        (phases()[0], {"input_projection"}),
        (phases()[1], {"input_projection", "query_projection"}),
        (phases()[2], {"input_projection", "query_projection"}),
        (Phase("backbone", ("backbone",), ("plain_texts",), 1, 1e-2), set()),
    ],
)
def test_projections_are_trained_with_the_tables_that_they_serve(phase, trained_too):
    before = parity().make_model(id_width=NARROW)
    weights, _ = train([dataclasses.replace(phase, epochs=1)], id_width=NARROW)
    assert set(weights) & set(DENSE) == trained_too
    for name in trained_too:
        assert (weights[name] - getattr(before, name)).abs().max() > 1e-3


def test_pretraining_starts_the_collaborative_tables_at_the_warmed_content():
    almost_no_training = dataclasses.replace(phases()[1], learning_rate=1e-12, epochs=1)
    weights, _ = train([phases()[0], almost_no_training])
    assert torch.allclose(weights["collaborative_items"], weights["content_items"], atol=1e-6)


def test_a_frozen_backbone_keeps_its_bytes():
    world = parity()
    models = []

    def make_model():
        models.append(world.make_model())
        return models[-1]

    before = digest_of_weights(world.make_model().backbone)
    loop.train(make_model, world.prompts, phases(epochs=2), world.shard(), settings(), log=lambda _: None)
    assert [digest_of_weights(model.backbone) for model in models] == [before] * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_backbone_stage_trains_the_backbone_and_nothing_else(architecture):
    world = parity()
    phase = Phase("backbone", ("backbone",), ("plain_texts",), 3, 1e-2)
    log = []
    weights = loop.train(
        lambda: world.make_model(architecture), world.prompts, [phase], world.shard(), settings(), log=log.append
    )
    losses = [entry["loss"] for entry in log if entry["event"] == "epoch"]
    assert losses[-1] < 0.7 * losses[0]
    assert weights
    assert all(name.startswith("backbone.") for name in weights)
    assert not set(weights) & set(TABLES.values())


@pytest.mark.parametrize("id_width", [None, NARROW])
def test_alternating_steps_train_one_side_at_a_time(id_width):
    """The first step reads only interactions, so it changes neither z^c nor the moments of z^c."""
    phase = dataclasses.replace(phases()[1], alternate=True, epochs=1, collaborative_from_content=False)
    alternating, log = train([phase], id_width=id_width)
    kinds = [entry["words"] > 0 for entry in log if entry["event"] == "step"]
    assert kinds[:4] == [False, True, False, True]
    joint, _ = train([dataclasses.replace(phase, alternate=False)], id_width=id_width)
    assert not torch.equal(alternating["content_items"], joint["content_items"])


def test_mutual_regularization_draws_the_tables_together():
    def distance(lambda_c):
        phase = dataclasses.replace(phases()[1], lambda_c=lambda_c, epochs=4, validate=None)
        weights, _ = train([phases()[0], phase])
        return (weights["collaborative_items"] - weights["content_items"]).norm().item()

    assert distance(10.0) < 0.5 * distance(0.0)


def test_accumulating_micro_batches_equals_one_large_batch():
    phase = dataclasses.replace(phases()[1], epochs=1, validate=None)
    tiny = parity().documents.take(np.arange(30))
    shard = Shard(tiny, None)
    one, log_one = train([phase], shard=shard, micro_batch_tokens=100 * 48)
    many, log_many = train([phase], shard=shard, micro_batch_tokens=2 * 48, accumulation=20)
    assert (
        [entry["event"] for entry in log_one] == [entry["event"] for entry in log_many] == ["expected", "step", "epoch"]
    )
    for name in one:
        assert torch.allclose(one[name], many[name], atol=1e-5), name


# A norm that is never reached changes no step, but turns row-wise steps off.
WHOLE_TABLES = {"gradient_clipping": 1e9}


@pytest.mark.parametrize(
    ("phase", "changes", "engine"),
    [
        (phases()[0], {}, RowWiseEngine),
        (phases()[2], {}, RowWiseEngine),
        (phases()[1], WHOLE_TABLES, TorchEngine),
        (dataclasses.replace(phases()[1], alternate=True), {}, TorchEngine),
        (Phase("backbone", ("backbone",), ("plain_texts",), 1, 1e-2), {}, TorchEngine),
    ],
)
def test_users_are_stepped_row_by_row_if_possible(phase, changes, engine, monkeypatch):
    engines = []

    def recorded(*arguments):
        engines.append(make_engine(*arguments))
        return engines[-1]

    monkeypatch.setattr(loop, "make_engine", recorded)
    train([dataclasses.replace(phase, epochs=1)], **changes)
    assert [type(created) for created in engines] == [engine]


def max_difference(left, right):
    assert set(left) == set(right)
    return max((left[name] - right[name]).abs().max().item() for name in left)


@pytest.mark.parametrize(("accumulation", "id_width"), [(1, None), (3, None), (3, NARROW)])
def test_row_wise_steps_end_at_the_same_tables_as_dense_steps(accumulation, id_width):
    """Pretraining reads every user in each epoch, but not in each step."""
    phase = dataclasses.replace(phases()[1], validate=None)
    by_row, log = train([phase], accumulation=accumulation, id_width=id_width)
    whole, _ = train([phase], accumulation=accumulation, id_width=id_width, **WHOLE_TABLES)
    assert sum(entry["event"] == "step" for entry in log) > 5
    assert max_difference(by_row, whole) < 1e-5
    before = parity().make_model(id_width=id_width).own_parameters()
    assert max_difference(by_row, {name: weight.detach() for name, weight in before.items()}) > 0.05


def test_validation_ranks_with_rows_that_took_all_steps():
    """Most users were last read some steps before the end of the epoch."""
    world, models, seen, saved = parity(), [], [], []

    def make_model():
        models.append(world.make_model())
        return models[-1]

    class RecordingValidation(Validation):
        def metrics(self, ranked_BK):
            seen.append(models[-1].collaborative_users.detach().clone())
            return super().metrics(ranked_BK)

    shard = Shard(world.documents, RecordingValidation(world.world.histories))
    loop.train(
        make_model, world.prompts, phases(epochs=2)[2:], shard, settings(), log=lambda _: None, save=saved.append
    )
    assert torch.equal(seen[0], saved[0].state["collaborative_users"])


@pytest.mark.parametrize("reads", [("recommendations",), ("texts",), ("plain_texts",), ("interactions", "texts")])
def test_an_epoch_reads_only_the_kinds_of_its_phase(reads):
    world = parity()
    phase = Phase("any", COLLABORATIVE, reads, 1, 1e-3)
    builder = EpochBuilder(world.prompts, world.token_space, 48, 0)
    whole, named = (
        Documents.concat([part for stream, _ in phase.streams(builder, documents, 0) for part in stream])
        for documents in (world.documents, world.documents.of_kinds(list(phase.kinds)))
    )
    assert len(whole) > 0
    assert named.to_arrow().equals(whole.to_arrow())
    assert len(world.documents.of_kinds(list(phase.kinds))) < len(world.documents) or len(reads) == 2


@pytest.mark.parametrize("at_once", [1, 7])
def test_validation_does_not_depend_on_its_chunks(monkeypatch, at_once):
    def validated():
        return [entry["validation_ndcg@100"] for entry in train(phases(epochs=1)[2:])[1] if entry["event"] == "epoch"]

    whole = validated()
    monkeypatch.setattr(loop, "_VALIDATED_AT_ONCE", at_once)
    assert whole == pytest.approx(validated())


@pytest.mark.parametrize(("first", "then"), [({}, WHOLE_TABLES), (WHOLE_TABLES, {})])
def test_a_checkpoint_resumes_between_row_wise_and_dense_steps(first, then):
    phase, saved = dataclasses.replace(phases()[1], validate=None), []
    whole, _ = train([phase], save=lambda checkpoint: saved.append(copied(checkpoint)), **first)
    resumed, _ = train([phase], resumed=saved[0], **then)
    assert {name for name in saved[0].state if name.startswith("content_users")} == {
        "content_users", "content_users.exp_avg", "content_users.exp_avg_sq"
    }  # fmt: skip
    assert max_difference(resumed, whole) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(bad):
    world = parity()

    def make_model():
        model = world.make_model()
        with torch.no_grad():
            model.collaborative_items[3, 0] = bad
        return model

    saved = []
    with pytest.raises(TrainingError, match=r"the loss of finetune, epoch 1, step 1 is (nan|inf)"):
        loop.train(
            make_model, world.prompts, phases()[2:], world.shard(), settings(), log=lambda _: None, save=saved.append
        )
    assert not saved


def test_every_document_of_an_epoch_is_stepped_once():
    _, log = train([dataclasses.replace(phases()[1], epochs=1)])
    documents = parity().documents
    assert sum(entry["documents"] for entry in log if entry["event"] == "step") == len(documents)


def test_damaged_and_foreign_checkpoints_are_skipped_with_a_warning(tmp_path):
    saved = []
    train(phases(epochs=3), save=lambda checkpoint: saved.append(copied(checkpoint)))
    folders = [tmp_path / f"checkpoint_{number}" for number in range(3)]
    for folder, checkpoint in zip(folders, saved, strict=False):
        folder.mkdir()
        write_checkpoint(folder, checkpoint, "this run")
    blob = bytearray((folders[2] / "best.safetensors").read_bytes())
    blob[-1] ^= 1
    (folders[2] / "best.safetensors").write_bytes(bytes(blob))
    by_name = {folder.name: contextlib.nullcontext(folder) for folder in folders}
    found, warnings = newest_valid(by_name, "this run")
    assert found is not None
    assert found.progress == saved[1].progress
    assert len(warnings) == 1
    assert "sha256 of best.safetensors differs" in warnings[0]
    (folders[1] / "state.safetensors").unlink()
    assert newest_valid(by_name, "this run")[0].progress == saved[0].progress
    with pytest.raises(ArtifactError, match="other data or another config"):
        read_checkpoint(folders[0], "another run")


def test_the_best_weights_of_a_resumed_run_do_not_depend_on_its_files(tmp_path):
    """Ray deletes old checkpoints, but the best weights are needed until the end."""
    best = {"table": torch.arange(100_000.0)}
    write_checkpoint(tmp_path, Checkpoint(Progress(), {}, best), "this run")
    read = read_checkpoint(tmp_path, "this run").best
    size = (tmp_path / "best.safetensors").stat().st_size
    with (tmp_path / "best.safetensors").open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size // 2))
    assert torch.equal(read["table"], best["table"])


def test_loading_parameters_gives_the_same_lists():
    ranker = trained()
    model = parity().make_model()
    load_parameters(model, {name: table.detach() for name, table in ranker.model.tables().items()})
    assert recall_at_1(Ranker(model, ranker.prompts, ranker.max_tokens)) == 1.0
