"""The configuration of a run: wrong settings are refused in a sentence that names the key, and values keep their types."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from cllm4rec.config import BackboneSize, load_config, parse_config, schema
from cllm4rec.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[1] / "jobs" / "configs").glob("*.yaml"))
MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}


@pytest.fixture
def load(tmp_path):
    def load_text(*overrides, text=None, **sections):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **sections}) if text is None else text)
        return load_config(path, overrides)

    return load_text


def refused(load, *overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("invalid config: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path):
    config = load_config(path)
    assert parse_config(config.model_dump()) == config


def test_a_bare_word_names_a_shipped_config():
    assert load_config("demo", ["seed=3"]) == load_config(CONFIGS[0].parent / "demo.yaml", ["seed=3"])
    with pytest.raises(
        ConfigError, match=r"no shipped config of that name; the shipped configs are .*\bdemo, my_data\b"
    ):
        load_config("nowhere")


def test_a_folder_does_not_hide_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").output_dir == "runs/demo"


def test_every_setting_is_described():
    sections = [thing for thing in vars(schema).values() if is_section(thing) and thing is not BaseModel]
    assert schema.Config in sections
    for section in sections:
        for name, field in section.model_fields.items():
            # The docstring of a section describes it wherever it is a setting.
            assert field.description or (is_section(field.annotation) and field.annotation.__doc__), (section, name)


def is_section(thing):
    return isinstance(thing, type) and issubclass(thing, BaseModel)


PAPER = {
    "beauty": ((10553, 6086, 94148), (0.1656, 0.2323, 0.1118)),
    "toys": ((11268, 7309, 95420), (0.1436, 0.1933, 0.0918)),
    "sports": ((22686, 12301, 185718), (0.0926, 0.1351, 0.0634)),
    "yelp": ((28330, 18775, 292017), (0.0735, 0.1149, 0.0536)),
}
"""Users, items, interactions, and CLLM4Rec's Recall@20, Recall@40, NDCG@100."""


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_hold_the_settings_of_the_paper(name):
    config = load_config(CONFIGS[0].parent / f"paper_{name}.yaml")
    counts, figures = PAPER[name]
    assert tuple(config.data.expected.model_dump().values()) == counts
    assert (config.data.interactions.format == "yelp") == (name == "yelp")
    assert (config.data.min_rating, config.data.core, config.data.split.kind) == (3.0, 5, "random")
    assert (config.model.backbone, config.backbone.epochs) == ("gpt2", 0)
    pretrain, finetune = config.pretrain, config.finetune
    assert (pretrain.warmup_epochs, pretrain.epochs, finetune.epochs) == (10, 100, 150)
    assert pretrain.patience >= pretrain.epochs
    assert finetune.patience >= finetune.epochs
    assert (pretrain.learning_rate, finetune.learning_rate) == (1e-3, 1e-4)
    assert (pretrain.lambda_c, finetune.lambda_c, finetune.mask_range, finetune.target) == (1, 1, (0.2, 0.2), "heldout")
    assert (pretrain.alternate, pretrain.reorder_items, pretrain.text_fraction) == (True, True, 1.0)
    assert (pretrain.user_dropout, finetune.user_dropout) == (0.0, 0.0)
    assert (config.cluster.num_workers, config.cluster.use_gpu, config.training.bf16) == (8, True, True)
    published = config.evaluate.published.results
    assert tuple(published["cllm4rec"].values()) == figures
    others = set(published) - {"cllm4rec"}
    assert {"multi_vae", "md_cvae", "bert4rec", "s3rec", "llm_scratch", "llm_cf", "llm_ftall", "llm_fixord"} <= others
    assert all(published[method]["recall@20"] < figures[0] for method in others), "the paper's is best of all"
    assert "2311.01343" in config.evaluate.published.source


def test_the_beauty_config_without_reviews_says_it_is_not_comparable():
    config = load_config(CONFIGS[0].parent / "compare_beauty.yaml")
    assert "cannot be compared" in config.evaluate.published.note
    assert config.data.min_rating is None


def test_the_template_holds_every_setting_with_its_default():
    path = CONFIGS[0].parent / "my_data.yaml"
    raw, config = yaml.safe_load(path.read_text()), load_config(path)
    default = parse_config({"output_dir": raw["output_dir"], "data": {"interactions": raw["data"]["interactions"]}})
    assert config == default
    assert keys_of(default.model_dump()) - keys_of(raw) <= {"run_date", "data.interactions.columns"}


def keys_of(section, prefix=""):
    """Dotted keys; what a source's columns are called is its own."""
    keys = set()
    for name, value in section.items():
        key = f"{prefix}{name}"
        inside = isinstance(value, dict) and key != "data.interactions.columns"
        keys |= keys_of(value, f"{key}.") if inside else {key}
    return keys


def test_a_minimal_file_is_a_whole_run(load):
    config = load()
    assert (config.data.core, config.training.engine, config.model.backbone) == (5, "deepspeed", BackboneSize())
    assert config.run.model == "runs/x/model"
    assert load("output_dir=s3://bucket/run/").run.model == "s3://bucket/run/model"


def test_a_config_is_frozen(load):
    with pytest.raises(ValidationError, match="frozen"):
        load().pretrain.epochs = 3


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("pretrain.epoch=3", "pretrain.epoch is not a setting (did you mean pretrain.epochs?)"),
        ("pretrane.epochs=3", "pretrane is not a setting (did you mean pretrain?)"),
        ("core=3", "core is not a setting (did you mean data.core?)"),
        ("model.backbone={layer: 1}", "model.backbone.layer is not a setting (did you mean model.backbone.layers?)"),
        ("pretrain.xyz=3", "pretrain.xyz is not a setting"),
        ("cluster.use_gpu=maybe", 'cluster.use_gpu is "maybe" and should be true or false'),
        ("model.table_start=noise", "model.table_start is now model.table_init"),
        ("data.interactions={format: yelp}", "data.interactions.path is missing"),
        ("pretrain.epochs=-1", "pretrain.epochs is -1 and should be at least 0"),
        ("pretrain.epochs=many", 'pretrain.epochs is "many" and should be a whole number'),
        ("pretrain.patience=", "pretrain.patience is null and should be a whole number"),
        ("training.zero_stage=4", "training.zero_stage is 4 and should be 0, 1, 2 or 3"),
        ("data.interactions.format=xml", "data.interactions.format is \"xml\" and should be 'amazon2014', "),
        ("data.interactions.path=[a, 3]", "data.interactions.path.1 is 3 and should be text"),
        ("model.revision=1234567", "model.revision is 1234567 and should be text (a number in quotes is text)"),
        ("pretrain.learning_rate=.nan", "pretrain.learning_rate is NaN and should be a finite number"),
        ("data.min_rating=.inf", "data.min_rating is Infinity and should be a finite number"),
        ("output_dir=''", 'output_dir is "" and should have at least 1 character'),
        ("pretrain=20", "pretrain is 20 and should be a section of settings"),
    ],
)
def test_a_wrong_setting_is_named(load, override, sentence):
    assert refused(load, override).startswith(sentence)


def test_missing_required_settings_are_named(load):
    assert refused(load, text="seed: 1\n") == "output_dir is missing; data is missing"


@pytest.mark.parametrize(
    ("backbone", "sentence"),
    [
        ("{layers: 0}", "model.backbone.layers is 0 and should be at least 1"),
        ("{depth: 3}", "model.backbone.depth is not a setting"),
        ("{heads: 3}", "model.backbone.width 128 does not divide by 3 heads"),
        ("5", "model.backbone is 5 and should be text (a number in quotes is text) or be a section of settings"),
    ],
)
def test_errors_of_a_backbone_do_not_mention_branches_of_the_union(load, backbone, sentence):
    assert refused(load, f"model.backbone={backbone}") == sentence


def test_a_name_or_a_size_makes_a_backbone(load):
    assert load("model.backbone=gpt2").model.backbone == "gpt2"
    assert load("model.backbone={architecture: t5, layers: 3}").model.backbone == BackboneSize(
        architecture="t5", layers=3
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["training.micro_batch_tokens=100"],
            "training.micro_batch_tokens 100 cannot hold a document of model.max_tokens 256; use 256 or more",
        ),
        (
            ["training.global_batch_tokens=100000", "training.micro_batch_tokens=4096", "cluster.num_workers=8"],
            "training.global_batch_tokens 100000 does not divide by 8 workers × training.micro_batch_tokens 4096; "
            "use 98304 or 131072",
        ),
        (
            ["data.split.validation=0.6", "data.split.test=0.4"],
            "data.split.validation 0.6 and data.split.test 0.4 leave nothing to train on; make them sum to less than 1",
        ),
        (
            ["serve.min_replicas=3", "serve.max_replicas=2"],
            "serve.min_replicas 3 is above serve.max_replicas 2; raise the latter",
        ),
        (
            ["data.max_text_tokens=250"],
            "data.max_text_tokens 250 leaves no room for the prompt in model.max_tokens 256; use at most 240",
        ),
        (
            ["finetune.mask_fraction=[0.9, 0.1]"],
            "finetune.mask_fraction [0.9, 0.1] is not a range; write the smaller share first",
        ),
    ],
)
def test_contradicting_settings_are_named_with_their_values(load, overrides, sentence):
    assert refused(load, *overrides) == sentence


def test_alternating_steps_need_the_torch_engine(load):
    assert "needs training.engine: torch" in refused(load, "pretrain.alternate=true")
    assert load("pretrain.alternate=true", "training.engine=torch").pretrain.alternate
    assert "moves what ZeRO divides; set training.engine" in refused(load, "training.cpu_offload=true")
    assert load("training.cpu_offload=true", "training.zero_stage=1").training.cpu_offload


def test_items_that_are_read_must_be_masked(load):
    assert "set evaluate.mask to train+validation" in refused(
        load, "evaluate.read=train+validation", "evaluate.mask=train"
    )


def test_published_figures_are_shares_of_known_metrics(load):
    published = "evaluate.published={{source: a paper, results: {{ease: {{{}}}}}}}"
    assert load(published.format("recall@20: 0.1")).evaluate.published.results == {"ease": {"recall@20": 0.1}}
    assert "should be at most 1" in refused(load, published.format("recall@20: 16.5"))
    assert "pattern" in refused(load, published.format("hits: 0.1"))


def test_values_of_a_sweep_keep_their_types(load):
    sweep = "compare.sweeps=[{name: x, settings: [a], values: [0, 1e-4, 0.5, true, gpt2, [0.1, 0.9]]}]"
    values = load(sweep).compare.sweeps[0].values
    assert values == [0, 1e-4, 0.5, True, "gpt2", [0.1, 0.9]]
    assert [type(value) for value in values] == [int, float, float, bool, str, list]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "compare={seeds: [0, 1], sweep_seeds: [2]}",
            "compare.sweep_seeds [2] should be a subset of compare.seeds [0, 1]",
        ),
        ("compare={sweep_seeds: [0, 0]}", "compare.sweep_seeds [0, 0] names a seed twice"),
        (
            "compare.sweeps=[{name: a b, settings: [x], values: [1, 2]}, {name: a_b, settings: [y], values: [1, 2]}]",
            "compare.sweeps a_b, a_b: two have the same name",
        ),
        ("compare.sweeps=[{name: ../a, settings: [x], values: [1, 2]}]", "compare.sweeps.0.name"),
        ("compare.sweeps=[{name: a, settings: [x], values: [1]}]", "compare.sweeps.0.values"),
    ],
)
def test_impossible_sweeps_are_refused(load, override, sentence):
    assert refused(load, override).startswith(sentence)


def test_tables_wider_than_a_language_model_to_build_are_refused(load):
    assert load("model.id_width=128").model.id_width == 128
    assert refused(load, "model.id_width=129") == (
        "model.id_width 129 is above model.backbone.width 128; use 128 or less, or null"
    )
    assert load("model={backbone: gpt2, id_width: 1024}").model.id_width == 1024, "the width of gpt2 is not known here"


def test_several_mistakes_are_reported_at_once(load):
    assert refused(load, "score.k=0", "pretrain.epoch=3") == (
        "pretrain.epoch is not a setting (did you mean pretrain.epochs?); score.k is 0 and should be at least 1"
    )


# Values as people write them


def test_overrides_replace_what_the_file_says(load):
    config = load("pretrain.epochs=3", "data.min_rating=null", "data.items.path=books.json", pretrain={"epochs": 9})
    assert (config.pretrain.epochs, config.data.min_rating, config.data.items.path) == (3, None, "books.json")


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_numbers_with_an_exponent_are_numbers(load, written):
    """YAML 1.1 reads 1e-4 as a string."""
    assert load(f"finetune.learning_rate={written}").finetune.learning_rate == 1e-4
    text = f"{yaml.safe_dump(MINIMAL)}finetune: {{learning_rate: {written}, mask_fraction: {written}}}\n"
    assert load(text=text).finetune.mask_fraction == 1e-4


def test_a_commit_that_looks_like_a_number_stays_text(load):
    assert load("model.revision=12e4567").model.revision == "12e4567"


def test_a_date_stays_text(load):
    assert load("model.revision=2026-11-20").model.revision == "2026-11-20"
    assert load(text=f"{yaml.safe_dump(MINIMAL)}model: {{revision: 2026-11-20}}\n").model.revision == "2026-11-20"


def test_a_run_date_is_a_day(load):
    assert str(load("run_date=2026-11-20").run_date) == "2026-11-20"
    with pytest.raises(ConfigError, match="run_date"):
        load("run_date=yesterday")


def test_a_section_left_empty_can_be_overridden(load):
    text = f"{yaml.safe_dump(MINIMAL)}pretrain:\n  # epochs: 20\n"
    assert load("pretrain.epochs=3", text=text).pretrain.epochs == 3
    assert refused(load, text=text) == "pretrain is null and should be a section of settings"


def test_mask_fraction_is_a_share_or_a_range(load):
    assert load("finetune.mask_fraction=0.3").finetune.mask_range == (0.3, 0.3)
    assert load("finetune.mask_fraction=[0.1, 0.9]").finetune.mask_range == (0.1, 0.9)


def test_accumulation_follows_from_the_sizes_of_batches(load):
    sizes = ["training.micro_batch_tokens=512", "cluster.num_workers=4"]
    assert load(*sizes, "training.global_batch_tokens=8192").accumulation == 4
    assert load(*sizes).accumulation == 1


@pytest.mark.parametrize("override", ["epochs", "=3", ""])
def test_an_override_without_a_key_or_a_value_is_refused(load, override):
    assert "is not of the form section.key=value" in refused(load, override)


def test_an_override_through_a_value_is_refused(load):
    assert "goes through 'epochs', which is a value" in refused(load, "pretrain.epochs.x=1", pretrain={"epochs": 3})


def test_an_override_that_is_not_yaml_is_refused(load):
    assert "is not valid YAML" in refused(load, "pretrain.epochs={")


# The file itself


def test_a_repeated_key_is_refused(load):
    assert "'output_dir' appears twice" in refused(load, text=f"{yaml.safe_dump(MINIMAL)}output_dir: elsewhere\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"output_dir: x\na: [", r"run\.yaml is not valid YAML in line 2, column 5: "),
        (b"just words", "has no sections"),
        (b"", "has no sections"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_without_a_config_is_refused(tmp_path, content, sentence):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        load_config(tmp_path / "run.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the config .*run\.yaml: No such file"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_python_objects_in_a_file_are_not_made(load):
    assert "is not valid YAML" in refused(load, text="output_dir: !!python/object/apply:os.getcwd []\n")
