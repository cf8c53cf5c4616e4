"""transformers' models with our experts and attention are the same function as with its own eager ones.

Both run in float32 and are held against the same model in float64: ours may be no further from it than eager is.
"""

from __future__ import annotations

import copy
import math
import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import ava_kernels.compat.hf as hf
import pytest
import torch
import transformers
from ava_kernels import moe_mlp, rope_attention
from torch.overrides import TorchFunctionMode
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

pytestmark = pytest.mark.usefixtures("small_and_seeded")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
}
MIXTRAL = SIZES | {"num_local_experts": 5, "intermediate_size": 20}
CONFIGS = {
    "mixtral": transformers.MixtralConfig(**MIXTRAL),
    "mixtral_window": transformers.MixtralConfig(**MIXTRAL, sliding_window=4),
    "qwen3": transformers.Qwen3MoeConfig(**SIZES, num_experts=7, moe_intermediate_size=18, intermediate_size=26),
    "deepseek": transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 6, "head_dim": 6},
        kv_lora_rank=10,
        q_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=18,
        intermediate_size=26,
    ),
    "olmoe": transformers.OlmoeConfig(**SIZES | {"head_dim": 4}, num_experts=6, intermediate_size=16),
}
S = 11
PADDED = torch.arange(S) >= torch.tensor([[0], [3]])  # the second sequence begins with three tokens of padding
BATCHES = {
    "whole": {},
    "padded_left": {"attention_mask": PADDED.long()},
    "padded_right": {"attention_mask": PADDED.flip(1).long()},
    "packed": {"position_ids": torch.tensor([[*range(S)], [*range(4), *range(S - 4)]])},
}


class InDouble(TorchFunctionMode):
    """Computes in float64 what a model in float64 insists on computing in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})


def random_model(name, **options):
    """With every parameter random and every activation of unit scale."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config, **{**implementations("eager"), **options})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in key else parameter.shape[-1] ** -0.5)
    return model


def implementations(name):
    return {"experts_implementation": name, "attn_implementation": name}


def switch(model, name):
    model.set_experts_implementation(name)
    model.set_attn_implementation(name)
    return model


def token_ids():
    return torch.randint(1, SIZES["vocab_size"], (2, S), generator=torch.Generator().manual_seed(2))


def results(model, batch):
    """→ the loss, the logits of real tokens, and every parameter's gradient, by name."""
    real = batch.get("attention_mask", torch.ones(2, S)).bool()
    told = real & real.roll(1, dims=1)  # a first token would be foretold by padding, whose output means nothing
    model.zero_grad()
    out = model(input_ids=token_ids(), labels=token_ids().masked_fill(~told, -100), use_cache=False, **batch)
    out.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()[real]} | gradients


def assert_no_further(ours, eager, truth):
    assert ours.keys() == eager.keys() == truth.keys()
    for name in truth:
        assert ours[name].dtype == eager[name].dtype == torch.float32
        rounding = torch.finfo(torch.float32).eps * truth[name].norm()
        assert truth[name].any()
        assert (ours[name] - truth[name]).norm() <= 4 * ((eager[name] - truth[name]).norm() + rounding), name


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_logits_and_all_gradients_are_those_of_eager(name, batch):
    model = random_model(name).train()
    with InDouble():
        truth = results(copy.deepcopy(model).double(), BATCHES[batch])
    eager = results(model, BATCHES[batch])
    assert_no_further(results(switch(model, "ava"), BATCHES[batch]), eager, truth)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generates_the_same_tokens(name, cache):
    model = random_model(name).eval()
    model.config.output_router_logits = False  # transformers' balance loss does not fit a cached step
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "use_cache": True}
    prompt = {"input_ids": token_ids() * PADDED, "attention_mask": PADDED.long()}
    eager = model.generate(**prompt, **options)
    assert eager.shape == (2, S + 12)
    assert torch.equal(switch(model, "ava").generate(**prompt, **options), eager)
    unpadded = {"input_ids": token_ids()}
    assert torch.equal(model.generate(**unpadded, **options), switch(model, "eager").generate(**unpadded, **options))


def test_window_and_padding_reach_the_attention():
    windowed, whole = random_model("mixtral_window", **implementations("ava")), random_model("mixtral")
    logits = windowed(token_ids()).logits
    assert not torch.allclose(logits[:, 4:], switch(whole, "ava")(token_ids()).logits[:, 4:], atol=1e-2)
    changed = token_ids()
    changed[:, :3] = 7
    padded = {"attention_mask": (torch.arange(S) >= 3).long().expand(2, S)}
    assert torch.equal(whole(token_ids(), **padded).logits[:, 3:], whole(changed, **padded).logits[:, 3:])


@pytest.mark.parametrize("how", ["made", "switched"])
def test_the_work_is_done_by_our_operations(how, monkeypatch):
    calls = []

    def spy(function):
        return lambda *args, **kwargs: calls.append(function.__name__) or function(*args, **kwargs)

    monkeypatch.setattr(hf, "moe_mlp", spy(hf.moe_mlp))
    monkeypatch.setattr(hf, "rope_attention", spy(hf.rope_attention))
    model = random_model("qwen3", **implementations("ava" if how == "made" else "eager"))
    if how == "switched":
        model(token_ids())
        assert not calls
        switch(model, "ava")
    model(token_ids(), attention_mask=torch.ones(2, S, dtype=torch.long))
    assert calls == ["rope_attention", "moe_mlp"] * 2
    switch(model, "eager")(token_ids())
    assert len(calls) == 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_autocast_computes_in_its_dtype(monkeypatch, name, fused):
    def spied(operation):
        def spy(*args, **options):
            out = operation(*args, **options)
            dtypes.add(out.dtype)
            return out

        return spy

    dtypes = set()
    monkeypatch.setattr(hf, "moe_mlp", spied(moe_mlp))
    monkeypatch.setattr(hf, "rope_attention", spied(rope_attention))
    model = random_model(name).eval()
    truth = model(token_ids(), use_cache=False).logits

    def error():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (model(token_ids(), use_cache=False).logits - truth).norm()

    eager = error()
    switch(model, "ava")
    if fused:
        hf.fuse_rotary(model)
    assert 0 < error() <= 1.5 * eager
    assert dtypes == {torch.bfloat16}


# --- Experts ---


def experts_module(kind, **config):
    config = SimpleNamespace(_experts_implementation="eager", **config)
    module = kind(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double()


def mixtral_experts(hidden_act="silu"):
    return experts_module(
        MixtralExperts, num_local_experts=5, hidden_size=8, intermediate_size=6, hidden_act=hidden_act
    )


def module_results(module, implementation, x, index, weights):
    leaves = [t.clone().requires_grad_() for t in (x, weights)]
    module.config._experts_implementation = implementation
    out = module(leaves[0], index, leaves[1])
    return [out, *torch.autograd.grad(out, [*leaves, *module.parameters()], torch.ones_like(out).cumsum(0))]


def assert_same_as_eager(module, index=None):
    x, weights = torch.randn(9, 8, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    if index is None:
        index = torch.rand(9, 5).topk(2).indices
    weights = weights * (index < 5)
    for ours, eager in zip(
        module_results(module, "ava", x, index, weights),
        module_results(module, "eager", x, index, weights),
        strict=True,
    ):
        assert eager.any()
        torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-12)


def test_transposed_weights_are_taken_where_they_are():
    assert_same_as_eager(experts_module(AriaExperts, moe_num_experts=5, hidden_size=8, intermediate_size=6))


def test_choices_of_other_ranks_experts_take_no_part():
    module = mixtral_experts()
    module._is_expert_parallel = True
    index = torch.rand(9, 8).topk(2).indices.clamp_max(5)  # 5 stands for the experts of other ranks
    index[0] = 5
    assert (index == 5).sum() > 2
    assert_same_as_eager(module, index)


def test_exact_gelu_gates():
    assert_same_as_eager(mixtral_experts("gelu"))


@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_without_a_gate(activation):
    sizes = {"n_routed_experts": 5, "hidden_size": 8, "moe_intermediate_size": 6, "moe_latent_size": None}
    assert_same_as_eager(experts_module(NemotronHExperts, mlp_hidden_act=activation, **sizes))


def refused_experts():
    yield "act_fn is GELUTanh", mixtral_experts("gelu_pytorch_tanh")
    gpt_oss = {"swiglu_alpha": 1.7, "swiglu_limit": 7.0}
    yield (
        "has_bias is True",
        experts_module(GptOssExperts, num_local_experts=5, hidden_size=8, intermediate_size=6, **gpt_oss),
    )
    for name, value in (("is_concatenated", False), ("has_post_expert_norm", True)):
        module = mixtral_experts()
        setattr(module, name, value)
        yield f"{name} is {value}", module

    class OwnGate(MixtralExperts):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0]

    yield (
        "_apply_gate",
        experts_module(OwnGate, num_local_experts=5, hidden_size=8, intermediate_size=6, hidden_act="silu"),
    )


@pytest.mark.parametrize("case", range(5))
def test_experts_that_compute_something_else_are_refused_by_name(case):
    named, module = list(refused_experts())[case]
    module.config._experts_implementation = "ava"
    x, index = torch.randn(9, 8, dtype=torch.float64), torch.rand(9, 5).topk(2).indices
    with pytest.raises(ValueError, match=f'{type(module).__name__}: .*{named}.*"ava".*set_experts_implementation'):
        module(x, index, torch.rand(9, 2, dtype=torch.float64))


# --- Attention ---


def loop(q, k, v, visible, bias, scale):
    """One softmax for each query. visible (B, H, S_q, S_k) bool, bias the same shape."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        head = h * k.shape[1] // q.shape[1]
        keys = visible[b, h, i].nonzero().flatten()
        if len(keys):
            scores = scale * (k[b, head, keys] @ q[b, h, i]) + bias[b, h, i, keys]
            out[b, h, i] = scores.softmax(0) @ v[b, head, keys]
    return out.transpose(1, 2)


ATTENTION = {  # S_q, S_k, D of the values, arguments, which keys query i sees
    "causal": (5, 5, 4, {}, lambda i, j: j <= i),
    "one_query": (1, 5, 4, {}, lambda i, j: j >= 0),
    "static_cache": (3, 7, 4, {}, lambda i, j: j <= i),
    "encoder": (5, 5, 4, {"is_causal": False}, lambda i, j: j >= 0),
    "cross": (3, 7, 4, {"is_causal": False}, lambda i, j: j >= 0),
    "wide_values": (5, 5, 6, {}, lambda i, j: j <= i),
    "mask": (5, 7, 4, {"masked": "bool"}, lambda i, j: (j + i) % 3 > 0),
    "added_mask": (5, 7, 4, {"masked": "float"}, lambda i, j: (j + 2 * i) % 3 > 0),
    "sees_nothing": (5, 5, 4, {"masked": "bool"}, lambda i, j: j < i),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_the_loop(case):
    S_q, S_k, D_v, options, sees = ATTENTION[case]
    B, H, H_kv = 2, 4, 2
    q, k, v = (
        torch.randn(B, heads, length, width, dtype=torch.float64, requires_grad=True)
        for heads, length, width in ((H, S_q, 4), (H_kv, S_k, 4), (H_kv, S_k, D_v))
    )
    visible = sees(torch.arange(S_q)[:, None], torch.arange(S_k)).expand(B, H, S_q, S_k)
    bias, mask = torch.zeros(B, H, S_q, S_k, dtype=torch.float64), None
    if options.get("masked"):
        mask = visible[:, :1]
    if options.get("masked") == "float":
        bias = torch.randn(B, H, S_q, S_k, dtype=torch.float64)
        mask = bias.masked_fill(~visible, -math.inf)
    module = SimpleNamespace(is_causal=True)
    causal = {"is_causal": options["is_causal"]} if "is_causal" in options else {}
    ours, weights = hf.attention(module, q, k, v, mask, scaling=0.7, sliding_window=2, **causal)
    truth = loop(q, k, v, visible, bias, 0.7)
    assert weights is None
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(truth)
    for got, expected in zip(
        torch.autograd.grad(ours, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_dropout_drops_attention_weights_and_scales_up_the_rest():
    q, k = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 8, 8)
    v = torch.eye(8).expand(2, 2, 8, 8)  # the output is the weights
    module = SimpleNamespace(is_causal=True)
    weights = hf.attention(module, q, k, v, None)[0]
    dropped = hf.attention(module, q, k, v, None, dropout=0.5)[0]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])
    assert 0.3 < kept.sum() / (weights != 0).sum() < 0.7


@pytest.mark.parametrize("name", ["s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices", "cache"])
def test_attention_of_another_kind_is_refused_by_name(name):
    q = torch.randn(1, 2, 3, 4)
    assert hf.attention(SimpleNamespace(), q, q, q, None, **{name: None})[0].shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=f'{name} is given.*"ava".*set_attn_implementation'):
        hf.attention(SimpleNamespace(), q, q, q, None, **{name: q})


def test_models_with_sinks_and_attention_weights_are_refused():
    sizes = SIZES | {"num_local_experts": 4, "intermediate_size": 16}
    sinks = transformers.GptOssForCausalLM._from_config(
        transformers.GptOssConfig(**sizes), attn_implementation="ava", experts_implementation="eager"
    )
    with pytest.raises(ValueError, match="GptOssAttention: s_aux is given"):
        sinks(token_ids())
    with pytest.raises(ValueError, match="output_attentions"):
        random_model("mixtral", **implementations("ava"))(token_ids(), output_attentions=True)


# --- The rotation within attention ---

DENSE = {key: SIZES[key] for key in list(SIZES)[:7]} | {"intermediate_size": 20, "pad_token_id": 0}
FUSED_CONFIGS = {
    "llama": transformers.LlamaConfig(**DENSE),
    "llama_yarn": transformers.LlamaConfig(
        **DENSE,
        attention_bias=True,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    ),
    "mistral": transformers.MistralConfig(**DENSE, sliding_window=None),
    "qwen3_dense": transformers.Qwen3Config(**DENSE),
    "mixtral": CONFIGS["mixtral"],
    "qwen3": CONFIGS["qwen3"],
}
ELSEWHERE = torch.arange(S) * torch.tensor([[1], [2]])
FUSED_BATCHES = BATCHES | {"elsewhere": {"position_ids": ELSEWHERE, "attention_mask": torch.ones(2, S).long()}}


@pytest.fixture
def rotations(monkeypatch):
    """→ for every call of rope_attention, whether it turns queries and keys."""
    calls = []

    def counted(q, k, v, cos=None, sin=None, **options):
        calls.append(cos is not None)
        return rope_attention(q, k, v, cos, sin, **options)

    monkeypatch.setattr(hf, "rope_attention", counted)
    return calls


@pytest.mark.parametrize("batch", FUSED_BATCHES)
@pytest.mark.parametrize("name", FUSED_CONFIGS)
def test_the_fused_rotation_changes_nothing(monkeypatch, rotations, name, batch):
    monkeypatch.setitem(CONFIGS, name, FUSED_CONFIGS[name])
    model = random_model(name).train()
    with InDouble():
        truth = results(copy.deepcopy(model).double(), FUSED_BATCHES[batch])
    eager = results(model, FUSED_BATCHES[batch])
    model.set_attn_implementation("ava")
    handle = hf.fuse_rotary(model)
    assert_no_further(results(model, FUSED_BATCHES[batch]), eager, truth)
    assert rotations == ([True] * 2 if batch in ("whole", "elsewhere") else [])
    rotations.clear()
    handle.remove()
    assert_no_further(results(model, FUSED_BATCHES[batch]), eager, truth)
    assert not any(rotations)


def test_what_cannot_be_fused_is_computed_as_before(monkeypatch, rotations):
    monkeypatch.setitem(CONFIGS, "llama", FUSED_CONFIGS["llama"])
    model = random_model("llama").eval()
    prompt = {"input_ids": token_ids(), "max_new_tokens": 5, "do_sample": False}
    eager = model.generate(**prompt)
    model.set_attn_implementation("ava")
    hf.fuse_rotary(model)
    assert torch.equal(model.generate(**prompt), eager)
    assert rotations
    assert not any(rotations)
    rotations.clear()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()(input_ids=token_ids(), use_cache=False)
    model.eval().set_attn_implementation("sdpa")
    model(input_ids=token_ids(), use_cache=False)
    assert rotations == []


def test_fusing_says_why_it_cannot():
    model = random_model("mixtral")
    with pytest.raises(ValueError, match=r"attn_implementation is 'eager': call model.set_attn_implementation"):
        hf.fuse_rotary(model)
    model.set_attn_implementation("ava")
    hf.fuse_rotary(model)
    with pytest.raises(ValueError, match="MixtralAttention has a forward of its own already"):
        hf.fuse_rotary(model)
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM has no attention layer that is known here: Llama"):
        hf.fuse_rotary(random_model("deepseek"))


@pytest.mark.parametrize("window", [None, 3])
def test_lengths_that_transformers_gives_keep_sequences_apart(window):
    ends = torch.tensor([0, 4, S], dtype=torch.int32)
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
    layer = random_model("mixtral").model.layers[0].self_attn
    q, k, v = (torch.randn(1, heads, S, 8) for heads in (6, 2, 2))
    out, _ = hf.attention(layer, q, k, v, None, sliding_window=window, **given)
    behind = torch.arange(S)[:, None] - torch.arange(S)
    document = torch.tensor([0] * 4 + [1] * 7)
    seen = (behind >= 0) & (document[:, None] == document) & (behind < (window or S))
    expected, _ = hf.attention(layer, q, k, v, seen[None, None])
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="MixtralAttention: cu_seq_lens_q is given with 2 rows"):
        hf.attention(layer, *(t.repeat(2, 1, 1, 1) for t in (q, k, v)), None, **given)
