"""The configuration tree: what is accepted, what is refused and how, and that no input ends in a traceback."""

from pathlib import Path

import pytest
import yaml
from ava_kernels.attention import op
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ava_fast.compatibility import MAX_HEAD_DIM, model_differences
from ava_fast.config import Config, ConfigError, dump_config, load_config, reference

ROOT = Path(__file__).parents[1]
LEAVES = [f"{section}.{leaf}" for section, body in Config().model_dump().items() for leaf in body]


def refused(source: str | None, *overrides: str, tmp_path: Path | None = None) -> list[str]:
    path = None
    if source is not None and tmp_path is not None:
        path = tmp_path / "c.yaml"
        path.write_text(source)
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return [str(fault) for fault in caught.value.faults]


def test_defaults_are_valid_and_round_trip_through_yaml(tmp_path: Path) -> None:
    config = load_config(None, ["training.learning_rate=0.1", "model.head_dim=6", "evaluation.prompt='é: \"x\"'"])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_config(path)


def test_overrides_are_typed_and_the_last_one_wins() -> None:
    config = load_config(None, ["training.learning_rate=3e-4", "training.max_steps=7", "training.max_steps=8"])
    assert config.training.learning_rate == 3e-4
    assert config.training.max_steps == 8
    assert load_config(None, ["model.head_dim=null"]).model.head_dim is None
    assert load_config(None, ["data.data_dir=/a=b"]).data.data_dir == "/a=b"


def test_sections_hold_sections(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {adaptive_lr: {plateau_patience: 7}}")
    config = load_config(tmp_path / "c.yaml", ["training.adaptive_lr.enabled=true"])
    assert (config.training.adaptive_lr.plateau_patience, config.training.adaptive_lr.enabled) == (7, True)
    assert not load_config(None).training.adaptive_lr.enabled
    faults = refused("training: {adaptive_lr: {enable: true, min_lr: -1}}", "training.adaptive_lr=3", tmp_path=tmp_path)
    assert [fault.split(":")[0] for fault in faults] == [
        "training.adaptive_lr",
        "training.adaptive_lr.enable",
        "training.adaptive_lr.min_lr",
    ]
    assert "closest valid key: training.adaptive_lr.enabled" in faults[1]
    (fault,) = refused("training: {adaptive_lr: 3}", tmp_path=tmp_path)
    assert "training.adaptive_lr: must be a section; given: 3; allowed: keys enabled, plateau_patience" in fault
    assert load_config(None, ["training.adaptive_lr.min_lr=null"]).training.adaptive_lr.min_lr is None


def test_exponents_without_a_point_are_numbers_in_files_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("training: {learning_rate: 3e-4, adam_eps: 1.e-9, lr_end: .5e-5}")
    training = load_config(tmp_path / "c.yaml").training
    assert (training.learning_rate, training.adam_eps, training.lr_end) == (3e-4, 1e-9, 0.5e-5)


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    source = """
    training: {learning_rat: 0.1, batch_size: eight, max_steps: 0}
    modle: {hidden_size: 8}
    moe: 3
    data: {max_length: 1}
    """
    faults = refused(source, "trainig.seed=1", "training.seed=x", "nonsense", tmp_path=tmp_path)
    assert len(faults) == 9
    by_key = {fault.split(":")[0]: fault for fault in faults}
    assert "closest valid key: training.learning_rate" in by_key["training.learning_rat"]
    assert "given: 0.1" in by_key["training.learning_rat"]
    assert "given: 'eight'; allowed: integer ≥ 1" in by_key["training.batch_size"]
    assert "given: 0; allowed: integer ≥ 1" in by_key["training.max_steps"]
    assert "closest valid key: model" in by_key["modle"]
    assert "given: 3; allowed: keys num_experts" in by_key["moe"]
    assert "closest valid key: training.seed" in by_key["trainig.seed"]
    assert "given: 'x'" in by_key["training.seed"]
    assert "section.key=value" in by_key["--override"]


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("training.batch_size=true", "integer ≥ 1"),
        ("training.batch_size='8'", "integer ≥ 1"),
        ("training.batch_size=8.0", "integer ≥ 1"),
        ("training.learning_rate=.nan", "number > 0"),
        ("training.learning_rate=.inf", "number > 0"),
        ("training.learning_rate=-1", "number > 0"),
        ("training.lr_scheduler_type=cosin", "one of cosine, cosine_with_restarts, linear,"),
        ("deepspeed.zero_stage=4", "one of 0, 1, 2, 3"),
        ("model.qk_norm=1", "true or false"),
        ("model.head_dim=a", "integer ≥ 1 or null"),
        ("logging.experiment_name=../x", "text matching"),
        ("data.validation_fraction=1", "number > 0.0 and < 1.0"),
        ("training.adam_beta1=1", "number ≥ 0.0 and < 1.0"),
        ("moe.num_experts=1025", "integer ≥ 0 and ≤ 1024"),
        ("moe.top_k=33", "integer ≥ 1 and ≤ 32"),
        ("moe.capacity_factor=0", "number > 0.0 or null"),
        ("moe.eval_capacity_factor=.inf", "number > 0.0 or null"),
        ("moe.overflow=nextbest", "one of next_best, drop"),
        ("moe.priority=order", "one of choice, probability"),
        ("moe.score=tanh", "one of softmax, sigmoid"),
        ("moe.max_reroutes=-1", "integer ≥ 0 or null"),
        ("moe.expert_bias_rate=-0.1", "number ≥ 0.0"),
        ("moe.scale=0", "number > 0.0"),
        ("data.data_dir=2026-01-32", None),  # not a date: text, and allowed
    ],
)
def test_values_are_strict(override: str, allowed: str | None) -> None:
    if allowed is None:
        load_config(None, [override])
        return
    (fault,) = refused(None, override)
    assert fault.startswith(override.split("=")[0])
    assert f"allowed: {allowed}" in fault


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.num_heads=5"], "model.num_heads"),
        (["model.head_dim=3"], "model.head_dim"),
        (["model.head_dim=258"], "model.head_dim"),
        (["model.num_kv_heads=3"], "model.num_kv_heads"),
        (["model.num_dense_layers=4"], "model.num_dense_layers"),
        (["moe.top_k=9"], "moe.top_k"),
        (["moe.shared_expert_gate=true"], "moe.shared_expert_gate"),
        (["moe.num_groups=4"], "moe.group_top_k"),
        (["moe.group_top_k=2"], "moe.num_groups"),
        (["moe.num_groups=3", "moe.group_top_k=2"], "moe.num_groups"),
        (["moe.num_groups=4", "moe.group_top_k=5"], "moe.group_top_k"),
        (["moe.num_groups=4", "moe.group_top_k=1", "moe.top_k=3"], "moe.group_top_k"),
        (["moe.num_groups=4", "moe.group_top_k=1", "moe.top_k=9"], "moe.top_k"),
        (["moe.overflow=drop", "moe.max_reroutes=1"], "moe.max_reroutes"),
        (["training.warmup_steps=1001"], "training.warmup_steps"),
        (["training.lr_end=1"], "training.lr_end"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], key: str) -> None:
    (fault,) = refused(None, *overrides)
    assert fault.startswith(f"{key}: does not go with")


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.num_groups=4", "moe.group_top_k=1", "moe.top_k=2"],
        ["moe.num_groups=1", "moe.group_top_k=1"],
        ["moe.overflow=drop", "moe.max_reroutes=0"],
        ["moe.overflow=drop", "moe.priority=probability"],  # of no consequence without a capacity
        ["moe.num_experts=0", "moe.top_k=9", "moe.num_groups=3", "moe.capacity_factor=1"],  # nor these without experts
    ],
)
def test_possible_combinations_are_accepted(overrides: list[str]) -> None:
    load_config(None, overrides)


def test_the_widest_head_is_attentions() -> None:
    assert MAX_HEAD_DIM == op.MAX_HEAD_DIM


def test_a_model_is_told_apart_by_what_it_computes_not_by_how_it_is_trained() -> None:
    base = ["moe.expert_bias_rate=0.001"]
    saved = load_config(None, base).model_dump()

    def differences(*overrides: str) -> list[str]:
        return model_differences(load_config(None, [*base, *overrides]), saved)

    tuned = ["capacity_factor=1.25", "overflow=drop", "priority=probability", "expert_bias_rate=0.1", "jitter=0.1"]
    assert differences(*(f"moe.{setting}" for setting in tuned)) == []
    assert differences("moe.expert_bias_rate=0") == ["moe.expert_bias_rate is 0, there it is above 0"]
    for setting in ("score=sigmoid", "scale=2.0", "normalize=false", "eval_capacity_factor=2.0", "top_k=1"):
        (difference,) = differences(f"moe.{setting}")
        assert difference.startswith(f"moe.{setting.split('=')[0]} is ")
    assert len(differences("moe.num_groups=4", "moe.group_top_k=2")) == 2
    for section in ("model", "moe"):  # a checkpoint that is older than a setting has its default
        saved[section] = {"num_layers": 3} if section == "model" else {}
    assert model_differences(load_config(None), saved) == []


def test_a_combination_is_reported_beside_an_unknown_key() -> None:
    faults = refused(None, "moe.top_k=9", "moe.topk=1")
    assert [fault.split(":")[0] for fault in faults] == ["moe.topk", "moe.top_k"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe", "not UTF-8 text: byte 0"),
        (b"- 1", "must hold sections"),
        (b"model: {a: 1, a: 2}", "given twice"),
        (b"1: 2", "is not text"),
        (b"a: &x [*x]", "is not a setting"),
        (b"x: !!python/object:os.system {}", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_broken_files_are_one_clear_line(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(tmp_path / "c.yaml")
    assert str(tmp_path / "c.yaml") in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: 1 fault.*\n.*No such file"):
        load_config("nowhere.yaml")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
trees = st.dictionaries(
    st.sampled_from(list(Config.model_fields)) | st.text(max_size=8),
    values
    | st.dictionaries(
        st.sampled_from([leaf.split(".")[1] for leaf in LEAVES]) | st.text(max_size=8), values, max_size=4
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(
    tree=trees,
    overrides=st.lists(st.builds("{}={}".format, st.sampled_from(LEAVES) | st.text(), st.text()), max_size=3),
)
@example(tree={"training": {"seed": 10**5000}}, overrides=[])
@example(tree={"\ud800": "\ud800"}, overrides=["training.seed=\ud800"])
@example(tree={}, overrides=["training.seed=2020-13-45", "=", ".=", "a.b.c=1", "training.=1"])
def test_any_tree_is_a_configuration_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object], overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    try:
        path.write_bytes(yaml.dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass"))
    except ValueError:  # an integer too long to print
        path.write_text("training: {seed: " + "1" * 5001 + "}")
    never_a_traceback(path, overrides)


@settings(max_examples=300, deadline=None)
@given(
    content=st.binary(max_size=80) | st.text(alphabet=" :{}[]-&*!|>%@`'\"#\n\tabtrue01.e", max_size=60).map(str.encode)
)
@example(content=b"? ")
@example(content=b"training: {seed: !!int ''}")
@example(content=b"training: {learning_rate: !!float x}")
@example(content=b"training: {seed: !!timestamp 2020-13-45}")
@example(content=b"<<: 3")
def test_any_bytes_are_a_configuration_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    never_a_traceback(path, [])


def never_a_traceback(path: Path, overrides: list[str]) -> None:
    faults = []
    try:
        assert isinstance(load_config(path, overrides), Config)
    except ConfigError as error:
        faults = error.faults
        assert faults, "refused without a reason"
    for line in map(str, faults):
        assert "\n" not in line
        assert len(line) < 2000
        line.encode()  # any terminal can show it


def test_every_setting_has_a_description() -> None:
    for body in Config.model_fields.values():
        for leaf, info in body.annotation.model_fields.items():  # type: ignore[union-attr]
            assert info.description, leaf


def test_the_reference_page_is_current() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == reference(), "python -m ava_fast.config > docs/configuration.md"
