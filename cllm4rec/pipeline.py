"""The stages of a run on a cluster, in order."""

from __future__ import annotations

from typing import Any

from cllm4rec.config import Config
from cllm4rec.data.prepare import prepare, prepare_inputs
from cllm4rec.evaluation.stage import evaluate, evaluate_inputs, reason_not_to_evaluate
from cllm4rec.nightly.plan import ScorePlan, is_published, plan_score
from cllm4rec.nightly.ray_job import forget_staged, score
from cllm4rec.nightly.report import NightReport
from cllm4rec.progress import show_count
from cllm4rec.resources import processes, wait_for_resources, watch_nodes
from cllm4rec.stages import Stage, artifact_stage, training_stages
from cllm4rec.training.ray_trainer import train_on_ray


def run_score(plan: ScorePlan, force: bool, accept_drift: bool = False) -> NightReport:
    """Wait for the resources of the actors, then score. force: delete the staged lists of an interrupted run of this plan."""
    config = plan.config
    if force:
        forget_staged(plan)
    # Ray Data needs one CPU besides those of the actors.
    bundles = processes(config.cluster, config.score.num_actors).bundles(reading_cpus=1)
    remedy = "lower score.num_actors or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(bundles, config.cluster, "score", remedy)
    with watch_nodes(bundles, "score"):
        return score(plan, show_count, accept_drift)


def _score(config: Config, force: bool) -> dict[str, Any]:
    return run_score(plan_score(config, force), force).to_json()


PREPARE = artifact_stage("prepare", "prepared", prepare_inputs, lambda config, _: prepare(config))
EVALUATE = artifact_stage(
    "evaluate", "evaluation", evaluate_inputs, lambda config, _: evaluate(config), "report.md", reason_not_to_evaluate
)
SCORE = Stage("score", "dump", is_published, _score)

PIPELINE = (PREPARE, *training_stages(train_on_ray), EVALUATE, SCORE)
STAGES = {stage.name: stage for stage in PIPELINE}
