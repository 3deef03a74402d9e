"""The stages of a run: their order, and which are skipped."""

import pytest

from cllm4rec.commands.cli import show_log
from cllm4rec.config import parse_config
from cllm4rec.errors import ArtifactError
from cllm4rec.pipeline import PIPELINE
from cllm4rec.stages import Stage, run_stage

MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}


@pytest.fixture(autouse=True)
def shown():
    """Prints the library's log records on stdout, as a command does."""
    with show_log():
        yield


class Recorded:
    """A stage that records its calls."""

    def __init__(self, is_done):
        self.runs = []
        self.stage = Stage("finetune", "model", lambda config: is_done, self.run)

    def run(self, config, force):
        self.runs.append(force)
        return {"users": 40}


CONFIG = parse_config(MINIMAL)


def test_an_up_to_date_stage_is_skipped_with_a_message(capsys):
    recorded = Recorded(is_done=True)
    result = run_stage(recorded.stage, CONFIG, force=False)
    assert (result, recorded.runs) == ({"directory": "runs/x/model", "report": None, "skipped": True}, [])
    assert capsys.readouterr().out == "finetune: up to date, skipped (runs/x/model); use --force to run it\n"


@pytest.mark.parametrize(("is_done", "force"), [(True, True), (False, False), (False, True)])
def test_a_stage_runs_when_it_is_not_done_or_forced(is_done, force, capsys):
    recorded = Recorded(is_done)
    result = run_stage(recorded.stage, CONFIG, force)
    assert recorded.runs == [force]
    assert (result["directory"], result["skipped"], result["counts"]) == ("runs/x/model", False, {"users": 40})
    assert capsys.readouterr().out.startswith("finetune: writing runs/x/model\nfinetune: done in ")


def test_the_pipeline_has_the_stages_of_the_contract_in_order():
    assert [(stage.name, stage.directory) for stage in PIPELINE] == [
        ("prepare", "prepared"),
        ("backbone", "backbone"),
        ("pretrain", "pretrained"),
        ("finetune", "model"),
        ("evaluate", "evaluation"),
        ("score", "dump"),
    ]


def test_a_stage_with_missing_inputs_is_an_error(tmp_path):
    config = parse_config({**MINIMAL, "output_dir": str(tmp_path)})
    for stage in PIPELINE[1:]:
        with pytest.raises(
            ArtifactError, match=r"prepared is not a finished prepared directory|is not a finished model"
        ):
            run_stage(stage, config, force=False)
