"""What a worker writes down, without a cluster."""

from cllm4rec.artifacts import remove_directory
from cllm4rec.training.loop import METRICS, _LogFile

STEP = {"event": "step", "stage": "finetune", "loss": 2.0, "items": 1.0, "words": 0.5, "penalty": 0.5}


def test_tensorboard_files_stay_when_the_run_directory_of_a_finished_stage_goes(tmp_path):
    log = _LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=True, tensorboard=True)
    log.keep(0)
    log(STEP)
    log.flush()
    log._writer.close()
    remove_directory(str(tmp_path / "runs" / "finetune"))
    (events,) = (tmp_path / "runs" / "tensorboard" / "finetune").iterdir()
    assert b"finetune/loss" in events.read_bytes()


def test_only_the_first_worker_writes(tmp_path):
    log = _LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=False, tensorboard=True)
    log.keep(0)
    log(STEP)
    assert log.flush() == 0
    assert list(tmp_path.iterdir()) == []
