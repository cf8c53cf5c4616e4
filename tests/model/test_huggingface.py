"""Ours and transformers' are the same function, before and after conversion, forward and backward."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ava_fast.config import Config
from ava_fast.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from ava_fast.errors import UserError
from ava_fast.model import huggingface
from ava_fast.model.generation import generate
from ava_fast.model.huggingface import export, import_folder, read_model, write_model
from ava_fast.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("small_and_seeded")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "eos_token_id": None,
    "bos_token_id": None,
}
MIXTRAL = SIZES | {"num_local_experts": 5, "intermediate_size": 22}
QWEN = SIZES | {"num_experts": 7, "moe_intermediate_size": 18, "intermediate_size": 26}
CASES = {
    "mixtral": transformers.MixtralConfig(**MIXTRAL),
    "mixtral_tied": transformers.MixtralConfig(**MIXTRAL, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "qwen3": transformers.Qwen3MoeConfig(**QWEN, norm_topk_prob=True),
    "qwen3_dense_prefix": transformers.Qwen3MoeConfig(**QWEN, mlp_only_layers=[0], tie_word_embeddings=True),
    "qwen2": transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=36),
    "qwen2_dense_prefix": transformers.Qwen2MoeConfig(
        **QWEN, shared_expert_intermediate_size=18, mlp_only_layers=[0, 1], qkv_bias=False, norm_topk_prob=True
    ),
}


def random_peer(config):
    """Transformers' model with every parameter random and every activation of unit scale."""
    torch.manual_seed(1)
    peer = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="sdpa", experts_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            elif "embed" in name or parameter.dim() == 1:
                parameter.normal_()
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return peer.train()


def build(weights, sections):
    model = Transformer(Config.model_validate(sections))
    model.load_state_dict(weights)
    return model


@pytest.fixture(params=CASES, scope="module")
def case(request, tmp_path_factory):
    peer = random_peer(CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    peer.save_pretrained(folder)
    weights, sections = import_folder(folder)
    return peer, folder, weights, sections


def tokens(rows=3, length=17):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


def test_imported_logits_equal_transformers_to_rounding(case):
    peer, _, weights, sections = case
    with torch.no_grad():
        theirs = peer(tokens()).logits
        exact = copy.deepcopy(peer).double()(tokens()).logits
        ours, _ = build(weights, sections).logits(tokens())
    assert exact.std() > 0.5
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()


def test_packed_documents_give_transformers_logits_of_restarting_positions(case):
    peer, _, weights, sections = case
    offsets = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    positions = torch.tensor([[*range(5), 0, *range(11)]])
    hidden, model = [], build(weights, sections)
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.no_grad():
        model(tokens(1), tokens(1), offsets)
        theirs = peer(tokens(1), position_ids=positions, use_cache=False).logits
        exact = copy.deepcopy(peer).double()(tokens(1), position_ids=positions, use_cache=False).logits
        apart = copy.deepcopy(peer).double()(tokens(1)[:, 6:]).logits
        ours = model.head(hidden[0])
    torch.testing.assert_close(exact[:, 6:], apart)  # it did keep the documents apart
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()


def test_imported_loss_and_every_gradient_equal_transformers_to_rounding(case, tmp_path):
    peer, folder, weights, sections = case
    precise = copy.deepcopy(peer).double()
    losses = [model(tokens(), labels=tokens()).loss for model in (peer, precise)]
    for loss in losses:
        loss.backward()

    def gradients(model):
        """Under our names: a gradient is converted as a weight is, here from transformers' fused layout."""
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file({name: p.grad.float() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
        return import_folder(tmp_path)[0]

    theirs, exact = gradients(peer), gradients(precise)
    peer.zero_grad()
    ours = build(weights, sections | {"moe": sections["moe"] | {"aux_loss_weight": 0.0, "z_loss_weight": 0.0}})
    labels = torch.cat((tokens()[:, 1:], torch.full((3, 1), -100)), dim=1)
    output = ours(tokens(), labels)
    output.objective.backward()

    assert (output.loss - losses[1]).abs() <= max(4 * (losses[0] - losses[1]).abs(), 4e-7 * losses[1])
    relative = {name: ((theirs[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    tolerance = 4 * max(relative.values())
    assert tolerance < 1e-4
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - exact[name]).norm() <= tolerance * exact[name].norm(), name


def test_balance_loss_weight_is_carried_at_the_same_strength(tmp_path):
    options = MIXTRAL | {"num_hidden_layers": 1, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    peer = random_peer(transformers.MixtralConfig(**options))
    peer.save_pretrained(tmp_path)
    weights, sections = import_folder(tmp_path)
    sections["moe"]["z_loss_weight"] = 0.0
    labels = torch.cat((tokens()[:, 1:], torch.full((3, 1), -100)), dim=1)
    objective = build(weights, sections)(tokens(), labels).objective
    torch.testing.assert_close(objective, peer(tokens(), labels=tokens()).loss)


def test_export_writes_what_transformers_writes(case, tmp_path):
    peer, folder, weights, sections = case
    config = Config.model_validate(sections | {"data": {"max_length": 64}})
    assert export(weights, config, tmp_path / "out") == peer.config.model_type
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    settings = {key: value for key, value in loaded.config.to_dict().items() if not key.startswith("_")}
    reference = transformers.AutoConfig.from_pretrained(folder).to_dict()
    different = {key for key in reference if key in settings and settings[key] != reference[key]}
    unused = {"intermediate_size"} if not config.model.num_dense_layers else set()  # no dense layer: never read
    assert different <= unused | {"router_aux_loss_coef"}
    assert settings["router_aux_loss_coef"] == pytest.approx(reference["router_aux_loss_coef"])


def test_exported_model_generates_the_same_tokens(case, tmp_path):
    _, _, weights, sections = case
    export(weights, Config.model_validate(sections), tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    prompts = tokens(6, 5)
    theirs = peer.generate(prompts, max_new_tokens=12, do_sample=False)[:, 5:].tolist()
    model = build(weights, sections)
    assert [generate(model, prompt, 12) for prompt in prompts.tolist()] == theirs
    assert len({token for row in theirs for token in row}) >= 5


def test_export_then_import_is_bitwise(case, tmp_path):
    _, _, weights, sections = case
    export(weights, Config.model_validate(sections), tmp_path / "out")
    again, sections_again = import_folder(tmp_path / "out")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert sections_again["moe"].pop("aux_loss_weight") == pytest.approx(sections["moe"]["aux_loss_weight"])
    assert sections_again == sections | {"moe": {k: v for k, v in sections["moe"].items() if k != "aux_loss_weight"}}


def test_own_format_round_trips(case, tmp_path):
    _, _, weights, sections = case
    write_model(weights, sections, tmp_path / "own")
    again, sections_again = read_model(tmp_path / "own")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert Config.model_validate(sections_again) == Config.model_validate(sections)


def test_tokenizer_travels_both_ways(tmp_path):
    tokenizer = train_tokenizer(["def f(x):\n    return x\n"] * 5, 280)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    config = small_config()
    export(Transformer(config).state_dict(), config, tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def main(x):\n    return 'π'"
    assert loaded(text).input_ids == tokenizer.encode(text).ids
    assert loaded.decode(tokenizer.encode(text).ids) == text
    assert (loaded.eos_token, loaded.eos_token_id) == (END_OF_TEXT, 0)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 0

    weights, sections = import_folder(tmp_path / "out")
    write_model(weights, sections, tmp_path / "own", tmp_path / "out")
    assert load_tokenizer(tmp_path / "own").to_str() == load_tokenizer(tmp_path / "out").to_str()
    assert json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())["eos_token"] == END_OF_TEXT


def small_config(**sections):
    model = {"vocab_size": 280, "hidden_size": 16, "num_layers": 2, "num_heads": 2} | sections.pop("model", {})
    moe = {"num_experts": 3, "intermediate_size": 6} | sections.pop("moe", {})
    return Config.model_validate({"model": model, "moe": moe})


@pytest.mark.parametrize(
    ("architecture", "model", "moe", "named"),
    [
        (
            "mixtral",
            {"num_dense_layers": 1},
            {"normalize": False},
            ["model.num_dense_layers: 0", "moe.normalize: true"],
        ),
        ("mixtral", {"norm": "layernorm", "qk_norm": True}, {}, ["model.norm: rmsnorm", "model.qk_norm: false"]),
        (
            "mixtral",
            {"attention_bias": True},
            {"shared_experts": 1},
            ["model.attention_bias: false", "moe.shared_experts: 0"],
        ),
        ("mixtral", {}, {"num_experts": 0}, ["moe.num_experts above 0"]),
        ("qwen3_moe", {"attention_bias": True}, {}, ["model.qk_norm: true", "model.attention_bias: false"]),
        ("qwen2_moe", {"qk_norm": True}, {}, ["model.qk_norm: false", "moe.shared_experts above 0"]),
        ("qwen2_moe", {}, {"shared_experts": 2}, ["moe.shared_expert_gate: true"]),
        (
            "mixtral",
            {},
            {"score": "sigmoid", "scale": 2.0, "expert_bias_rate": 0.1, "eval_capacity_factor": 1.0},
            ["moe.score: softmax", "moe.scale: 1", "moe.expert_bias_rate: 0", "moe.eval_capacity_factor: null"],
        ),
        ("qwen3_moe", {"qk_norm": True}, {"num_groups": 3, "group_top_k": 2}, ["moe.num_groups: null"]),
        (None, {"norm": "layernorm"}, {}, ["mixtral needs", "qwen3_moe needs", "qwen2_moe needs"]),
    ],
)
def test_export_names_every_setting_that_cannot_be_expressed(tmp_path, architecture, model, moe, named):
    config = small_config(model=model, moe=moe)
    with pytest.raises(UserError) as refusal:
        export(Transformer(config).state_dict(), config, tmp_path / "out", architecture=architecture)
    assert all(part in str(refusal.value) for part in named), refusal.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "moe", "expected"),
    [
        ({}, {"jitter": 0.1, "capacity_factor": 1.0, "num_groups": 3, "group_top_k": 3}, "mixtral"),
        ({"qk_norm": True, "num_dense_layers": 1}, {"normalize": False}, "qwen3_moe"),
        ({"attention_bias": True}, {"shared_experts": 2, "shared_expert_gate": True}, "qwen2_moe"),
    ],
)
def test_export_chooses_the_architecture_that_fits(tmp_path, model, moe, expected):
    config = small_config(model=model, moe=moe)
    assert export(Transformer(config).state_dict(), config, tmp_path / "out") == expected


def test_export_refuses_weights_of_another_config_and_unknown_architectures(tmp_path):
    config = small_config()
    weights = Transformer(config).state_dict()
    weights["blocks.0.mlp.router"] = weights["blocks.0.mlp.router"][:2]
    weights["extra"] = weights.pop("norm.weight")
    with pytest.raises(UserError, match=r"missing: norm.weight; unexpected: extra; .*blocks.0.mlp.router is \(2, 16\)"):
        export(weights, config, tmp_path / "out")
    with pytest.raises(UserError, match="'llama' is not known; allowed: mixtral"):
        export(weights, config, tmp_path / "out", architecture="llama")


def test_nothing_half_written_and_nothing_overwritten(tmp_path, monkeypatch):
    config = small_config()
    weights = Transformer(config).state_dict()
    (tmp_path / "out").mkdir()
    export(weights, config, tmp_path / "out")  # an empty folder may be there
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="is not an empty folder"):
        export(weights, config, tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "_write_json", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export(weights, config, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_own_format_keeps_the_expert_bias(tmp_path):
    config = small_config(moe={"expert_bias_rate": 0.1, "score": "sigmoid", "num_groups": 3, "group_top_k": 2})
    model = Transformer(config)
    model.blocks[1].mlp.expert_bias.normal_()
    write_model(model.state_dict(), config.model_dump(include={"model", "moe"}), tmp_path / "own")
    weights, sections = read_model(tmp_path / "own")
    assert torch.equal(weights["blocks.1.mlp.expert_bias"], model.blocks[1].mlp.expert_bias)
    assert Config.model_validate(sections) == config


def test_own_format_that_does_not_fit_together_is_refused(tmp_path):
    config = small_config()
    sections = config.model_dump(include={"model", "moe"})
    write_model(Transformer(config).state_dict(), sections, tmp_path / "own")
    file = tmp_path / "own" / "config.yaml"
    file.write_text(file.read_text().replace("num_experts: 3", "num_experts: 4"))
    with pytest.raises(UserError, match=r"blocks.0.mlp.router is \(3, 16\) where \(4, 16\) is needed"):
        read_model(tmp_path / "own")
    file.write_text(file.read_text().replace("num_experts: 4", "num_expert: 3"))
    with pytest.raises(UserError, match=r"moe.num_expert: is not a setting"):
        read_model(tmp_path / "own")


def test_router_noise_and_rotary_base_are_written_for_old_and_new_transformers(tmp_path):
    config = small_config(model={"rope_theta": 5e5}, moe={"jitter": 0.125})
    export(Transformer(config).state_dict(), config, tmp_path / "out")
    options = json.loads((tmp_path / "out" / "config.json").read_text())
    assert options["rope_theta"] == options["rope_parameters"]["rope_theta"] == 5e5
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").router_jitter_noise == 0.125
    assert import_folder(tmp_path / "out")[1]["moe"]["jitter"] == 0.125


@pytest.fixture
def mixtral_folder(tmp_path):
    random_peer(CASES["mixtral"]).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change(folder, *without, **options):
    file = folder / "config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in without}
    file.write_text(json.dumps(kept | options))


def test_shards_old_rope_key_and_half_precision(mixtral_folder):
    whole, sections = import_folder(mixtral_folder)
    tensors = load_file(mixtral_folder / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    (mixtral_folder / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, mixtral_folder / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (mixtral_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    change(mixtral_folder, "rope_parameters", rope_theta=5e5, rope_scaling=None)
    weights, sections_again = import_folder(mixtral_folder)
    assert sections_again["model"].pop("rope_theta") == 5e5
    assert sections["model"].pop("rope_theta") == 1e6
    assert sections_again == sections
    assert all(torch.equal(weights[name], whole[name].bfloat16().float()) for name in whole)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}

    (mixtral_folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b.safetensors: not found"):
        import_folder(mixtral_folder)


def test_rotary_base_is_read_where_transformers_reads_it(mixtral_folder):
    for options in ({"rope_theta": 7.0}, {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}}, {}):
        change(mixtral_folder, "rope_parameters", "rope_theta", **options)
        theirs = transformers.AutoConfig.from_pretrained(mixtral_folder).rope_parameters["rope_theta"]
        assert import_folder(mixtral_folder)[1]["model"]["rope_theta"] == theirs


def test_import_names_every_unsupported_option(mixtral_folder):
    change(
        mixtral_folder,
        "vocab_size",
        sliding_window=4096,
        hidden_act="gelu",
        attention_dropout=0.1,
        num_hidden_layers="3",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0},
        quantization_config={"quant_method": "fp8"},
    )
    with pytest.raises(UserError) as refusal:
        import_folder(mixtral_folder)
    keys = ["vocab_size is missing", "sliding_window: 4096", "hidden_act: 'gelu'", "attention_dropout: 0.1"]
    keys += ["num_hidden_layers: '3'", "rope_type: 'yarn'", "quantization_config"]
    assert all(key in str(refusal.value) for key in keys), refusal.value


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("qwen3", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\]"),
        ("qwen3", {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        ("qwen3", {"attention_bias": True}, "attention_bias: True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window: True"),
        ("qwen3", {"num_local_experts": 0}, "the number of experts is 0; must be at least 1"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ("qwen3", {"num_attention_heads": 5}, "model.num_kv_heads: .*a divisor of model.num_heads"),
        ("qwen2", {"shared_expert_intermediate_size": 37}, "shared_expert_intermediate_size: 37 must be a multiple"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: 'sliding_attention'"),
        ("qwen2", {"model_type": "llama"}, "model_type 'llama' is not supported; supported: mixtral"),
    ],
)
def test_import_refuses(tmp_path, name, options, named):
    CASES[name].save_pretrained(tmp_path)
    change(tmp_path, **options)
    with pytest.raises(UserError, match=named):
        import_folder(tmp_path)


def test_import_names_every_tensor_that_does_not_fit(mixtral_folder):
    file = mixtral_folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not views of what is overwritten
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(60)
    tensors["model.norm.weight"] = torch.zeros(27)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    del tensors["model.layers.1.block_sparse_moe.experts.4.w2.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError) as refusal:
        import_folder(mixtral_folder)
    assert "missing: model.layers.1.block_sparse_moe.experts.4.w2.weight" in str(refusal.value)
    assert "unexpected: model.layers.0.self_attn.q_proj.bias" in str(refusal.value)
    assert "model.norm.weight is (27,) where (28,) is needed" in str(refusal.value)
    assert "fp16: lm_head.weight" in str(refusal.value)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        import_folder(mixtral_folder)


def test_tied_model_with_a_head_of_its_own_is_refused(mixtral_folder):
    change(mixtral_folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.weight is not the embedding"):
        import_folder(mixtral_folder)


def test_runs_without_transformers():
    program = "import sys, ava_fast.model.huggingface; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
