"""MegaBlocks' layers against loops over tokens and experts, most of them in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from ava_kernels.compat import megablocks
from ava_kernels.compat.megablocks import Arguments, MoE, dMoE, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.usefixtures("small_and_seeded")
exact = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _nothing_collected():
    megablocks.clear_load_balancing_loss()
    megablocks.clear_router_zloss()
    yield
    megablocks.clear_load_balancing_loss()
    megablocks.clear_router_zloss()


H, Fh, E = 6, 5, 4


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def arguments(**changes):
    settings = {"hidden_size": H, "ffn_hidden_size": Fh, "moe_num_experts": E, "moe_top_k": 2, "fp16": False}
    settings |= {"init_method": lambda t: t.normal_(std=0.5), "output_layer_init_method": lambda t: t.normal_(std=0.5)}
    return Arguments(**(settings | {"device": "cpu"} | changes))


def random_layer(kind, args, **options):
    """In float64, and with a bias that is not zero."""
    layer = kind(args, **options).double()
    if args.bias:
        torch.nn.init.normal_(layer.experts.bias)
    return layer


def plain_layer(layer, x):
    """What MegaBlocks documents, one token and expert at a time → out and bias together, (T, H)."""
    args, p = layer.args, dict(layer.named_parameters())
    x_TH = x.reshape(-1, args.hidden_size)
    T, K = len(x_TH), args.moe_top_k
    limit = T * K
    if isinstance(layer, MoE) and not isinstance(layer, dMoE):
        limit = int(args.moe_capacity_factor * T * K / args.moe_num_experts) or T * K
    taken, rows = [0] * args.moe_num_experts, []
    for x_H in x_TH:
        scores = (p["router.layer.weight"] @ x_H).softmax(-1)
        weights, experts = scores.topk(K)
        if args.moe_normalize_expert_weights:
            order = args.moe_normalize_expert_weights
            weights = weights / (weights**order).sum() ** (1 / order)
        row = torch.zeros_like(x_H)
        for weight, e in zip(weights, experts.tolist(), strict=True):
            taken[e] += 1
            if taken[e] <= limit:
                row = row + weight * plain_expert(layer, p, e, x_H)
        bias = p.get("experts.bias", 0.0)
        shared = plain_shared(args, p, x_H) if args.shared_expert else 0.0
        if args.shared_expert_weighted_sum:
            rows.append(shared / (K + 1) + (row + bias) * K / (K + 1))
        else:
            rows.append(shared + row + bias)
    return torch.stack(rows)


def plain_expert(layer, p, e, x_H):
    args, w1, w2 = layer.args, p["experts.mlp.w1"], p["experts.mlp.w2"]
    if not isinstance(layer, dMoE):
        return args.activation_fn(x_H @ w1[e]) @ w2[e]
    mine = slice(e * args.ffn_hidden_size, (e + 1) * args.ffn_hidden_size)
    h = args.activation_fn(w1[mine] @ x_H)
    if args.mlp_type == "glu":
        h = h * (p["experts.mlp.v1"][mine] @ x_H)
    return h @ w2[mine]


def plain_shared(args, p, x_H):
    def linear(name, x):
        return F.linear(x, p[f"shared_expert.{name}.weight"], p.get(f"shared_expert.{name}.bias"))

    up = linear("up_proj", x_H)
    if args.mlp_type == "glu":
        return linear("down_proj", args.activation_fn(linear("gate_proj", x_H)) * up)
    return linear("down_proj", args.activation_fn(up))


def total(returned):
    """out + bias, whichever way they come."""
    return returned[0] + returned[1] if isinstance(returned, tuple) else returned


CASES = {
    "mlp": {},
    "glu": {"mlp_type": "glu"},
    "top_1": {"moe_top_k": 1},
    "every_expert": {"moe_top_k": E},
    "one_expert": {"moe_num_experts": 1, "moe_top_k": 1},
    "no_bias": {"bias": False},
    "added_bias": {"return_bias": False},
    "l1_weights": {"moe_normalize_expert_weights": 1},
    "l2_weights": {"moe_normalize_expert_weights": 2.0, "moe_top_k": 3},
    "half_capacity": {"moe_capacity_factor": 0.5},
    "half_capacity_top_1": {"moe_capacity_factor": 0.5, "moe_top_k": 1},
    "no_capacity": {"moe_capacity_factor": 0},
    "large_capacity": {"moe_capacity_factor": 100},
    "shared": {"shared_expert": True},
    "shared_glu_wider": {"shared_expert": True, "mlp_type": "glu", "shared_expert_hidden_size": 9},
    "shared_weighted": {"shared_expert": True, "shared_expert_weighted_sum": True},
    "shared_weighted_added_bias": {"shared_expert": True, "shared_expert_weighted_sum": True, "return_bias": False},
    "shared_no_bias": {"shared_expert": True, "bias": False},
    "silu": {"activation_fn": F.silu, "mlp_type": "glu"},
    "less_memory": {"memory_optimized_mlp": True, "mlp_type": "glu"},
    "sparse": {"mlp_impl": "sparse"},
}


@pytest.mark.parametrize("kind", [MoE, dMoE])
@pytest.mark.parametrize("case", CASES)
def test_layers_and_all_gradients_are_the_loop(case, kind):
    layer = random_layer(kind, arguments(**CASES[case]))
    x = leaf(3, 4, H)
    returned = layer(x)
    args = layer.args
    assert isinstance(returned, tuple) == (args.bias and args.return_bias)
    got, truth = total(returned), plain_layer(layer, x)
    assert got.shape == x.shape
    torch.testing.assert_close(got.view(-1, H), truth, **exact)
    upstream = torch.randn_like(got)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad(got, leaves, upstream)
    expected = torch.autograd.grad(truth, leaves, upstream.view(-1, H), allow_unused=True)  # an idle expert of a list
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, **exact)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([MoE, dMoE]),
    mlp_type=st.sampled_from(["mlp", "glu"]),
    shape=st.sampled_from([(1, 1), (5, 1), (1, 7), (3, 5)]),
    experts_and_k=st.sampled_from([(1, 1), (3, 1), (3, 2), (7, 3), (16, 2)]),
    factor=st.sampled_from([0, 0.3, 1, 1.5]),
    favourite=st.booleans(),
)
def test_layers_are_the_loop_for_any_sizes(kind, mlp_type, shape, experts_and_k, factor, favourite):
    experts, K = experts_and_k
    args = arguments(mlp_type=mlp_type, moe_num_experts=experts, moe_top_k=K, moe_capacity_factor=factor)
    layer = random_layer(kind, args)
    x = torch.randn(*shape, H, dtype=torch.float64)
    if favourite:  # every token's first choice is the last expert
        x[..., 0] = 5.0
        with torch.no_grad():
            layer.router.layer.weight[-1, 0] += 20.0
    torch.testing.assert_close(total(layer(x)).view(-1, H), plain_layer(layer, x), **exact)


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_no_tokens(overflow):
    for layer in (
        random_layer(MoE, arguments(moe_zloss_weight=1.0), overflow=overflow),
        random_layer(dMoE, arguments()),
    ):
        x = torch.zeros(0, 4, H, dtype=torch.float64, requires_grad=True)
        out, bias = layer(x)
        assert out.shape == x.shape
        loss = out.sum() + bias.sum() + megablocks.batched_load_balancing_loss(layer.args)
        if layer.args.moe_zloss_weight:
            loss = loss + megablocks.batched_router_zloss(layer.args).sum()
        assert loss.isfinite()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
        assert (layer.experts.mlp.w1.grad == 0.0).all()
        megablocks.clear_load_balancing_loss()


def chooser(kind, choices, **options):
    """A layer whose token t, row t of the identity, ranks the experts as given; experts multiply by e + 1."""
    tokens, experts = len(choices), len(choices[0])
    args = arguments(
        hidden_size=tokens,
        ffn_hidden_size=tokens,
        moe_num_experts=experts,
        activation_fn=lambda x: x,
        bias=False,
        **options.pop("args", {}),
    )
    layer = kind(args, **options).double()
    with torch.no_grad():
        for token, ranking in enumerate(choices):
            for rank, expert in enumerate(ranking):
                layer.router.layer.weight[expert, token] = -float(rank)
        eye = torch.eye(tokens, dtype=torch.float64)
        layer.experts.mlp.w1.copy_(eye.expand(experts, -1, -1))
        layer.experts.mlp.w2.copy_(eye * torch.arange(1, experts + 1)[:, None, None])
    return layer, eye[:, None]


def test_a_full_expert_keeps_the_lowest_tokens_whatever_their_slot():
    # One pair an expert: expert 0 is token 0's second and token 1's first choice, and keeps the former.
    layer, x = chooser(MoE, [[1, 0, 2, 3], [0, 2, 1, 3]], args={"moe_capacity_factor": 1.0})
    assert layer._capacity(2) == 1
    scores = torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64).softmax(0)
    expected = torch.diag(torch.stack([2 * scores[0] + 1 * scores[1], 3 * scores[1]]))
    torch.testing.assert_close(layer(x)[:, 0], expected, **exact)


def test_overflow_goes_on_to_the_next_best_expert_where_asked():
    choices = [[0, 1, 2, 3]] * 4  # all want the same; one pair an expert
    scores = torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64).softmax(0)
    one = {"moe_top_k": 1}
    dropping, x = chooser(MoE, choices, args=one)
    expected = torch.diag(torch.stack([scores[0], *torch.zeros(3, dtype=torch.float64)]))
    torch.testing.assert_close(dropping(x)[:, 0], expected, **exact)

    rerouting, x = chooser(MoE, choices, args=one, overflow="next_best")
    expected = torch.diag(torch.arange(1, 5) * scores)
    torch.testing.assert_close(rerouting(x)[:, 0], expected, **exact)
    requests, _ = megablocks.get_load_balancing_loss()[-1]
    assert requests.tolist() == [4, 0, 0, 0]  # before capacity

    normalized, x = chooser(MoE, choices, args=one | {"moe_normalize_expert_weights": 1}, overflow="next_best")
    torch.testing.assert_close(normalized(x)[:, 0], torch.diag(torch.arange(1.0, 5)).double(), **exact)


def test_what_finds_no_room_anywhere_adds_nothing_and_has_a_gradient():
    args = {"moe_top_k": 1, "moe_capacity_factor": 0.5, "moe_normalize_expert_weights": 2}
    layer, x = chooser(MoE, [[0, 1, 2, 3]] * 8, args=args, overflow="next_best")
    out = layer(x)[:, 0]
    torch.testing.assert_close(out, torch.diag(torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0])).double(), **exact)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("factor", [0, 100])
def test_without_drops_both_layers_are_the_same(factor):
    moe, dropless = random_layer(MoE, arguments(moe_capacity_factor=factor)), random_layer(dMoE, arguments())
    state = moe.state_dict()
    state["experts.mlp.w1"] = state["experts.mlp.w1"].mT.flatten(0, 1)
    state["experts.mlp.w2"] = state["experts.mlp.w2"].flatten(0, 1)
    dropless.load_state_dict(state)
    x = torch.randn(2, 9, H, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], dropless(x)[0], **exact)


@pytest.mark.parametrize("kind", [MoE, dMoE])
@pytest.mark.parametrize("mlp_type", ["mlp", "glu"])
def test_parameters_are_those_of_megablocks(kind, mlp_type):
    args = arguments(mlp_type=mlp_type, shared_expert=True, shared_expert_hidden_size=7, bf16=True)
    shapes = {name: tuple(t.shape) for name, t in kind(args).state_dict().items()}
    expected = {
        "router.layer.weight": (E, H),
        "experts.bias": (H,),
        "experts.mlp.w1": (E * Fh, H) if kind is dMoE else (E, H, Fh),
        "experts.mlp.w2": (E * Fh, H) if kind is dMoE else (E, Fh, H),
        "shared_expert.up_proj.weight": (7, H),
        "shared_expert.up_proj.bias": (7,),
        "shared_expert.down_proj.weight": (H, 7),
        "shared_expert.down_proj.bias": (H,),
    }
    if mlp_type == "glu":
        expected |= {"shared_expert.gate_proj.weight": (7, H), "shared_expert.gate_proj.bias": (7,)}
        if kind is dMoE:
            expected["experts.mlp.v1"] = (E * Fh, H)
    assert shapes == expected
    assert {t.dtype for t in kind(args).state_dict().values()} == {torch.bfloat16}
    assert (kind(args).experts.bias == 0.0).all()
    bare = kind(dataclasses.replace(args, bias=False, shared_expert=False))
    assert set(bare.state_dict()) == {n for n in expected if "bias" not in n and "shared" not in n}


def test_weights_are_filled_by_the_given_functions():
    seen = []

    def first(t):
        seen.append(tuple(t.shape))
        t.fill_(1.0)

    for kind in (MoE, dMoE):
        layer = kind(arguments(mlp_type="glu", init_method=first, output_layer_init_method=lambda t: t.fill_(2.0)))
        filled = {name: t.unique().tolist() for name, t in layer.state_dict().items()}
        expected = {
            "router.layer.weight": [1.0],
            "experts.bias": [0.0],
            "experts.mlp.w1": [1.0],
            "experts.mlp.w2": [2.0],
        }
        assert filled == expected | ({"experts.mlp.v1": [1.0]} if kind is dMoE else {})
    assert seen == [(E, H), (E, Fh, H), (E, H), (E, Fh, H), (E, Fh, H)]  # so that fans are what they are there
    counted = {"init_method": lambda t: t.copy_(torch.arange(t.numel()).view(t.shape))}
    by_expert, flat = MoE(arguments(**counted)).experts.mlp.w1, dMoE(arguments(**counted)).experts.mlp.w1
    assert torch.equal(by_expert.mT.flatten(0, 1), flat)
    normal = dMoE(Arguments(hidden_size=64, ffn_hidden_size=64, moe_num_experts=8, device="cpu"))
    assert normal.experts.mlp.w2.float().std().item() == pytest.approx(0.02, rel=0.05)


# --- The routers' losses ---


@pytest.mark.parametrize("kind", [MoE, dMoE])
def test_load_balancing_loss_is_the_formula_over_all_layers(kind):
    args = arguments(num_layers=2, moe_loss_weight=0.3)
    layers = [random_layer(kind, args), random_layer(kind, args)]
    x = leaf(3, 5, H)
    expected = 0.0
    for layer in layers:
        layer(x)
        scores = F.linear(x.view(-1, H), layer.router.layer.weight).softmax(-1)
        chosen = scores.topk(2).indices
        for e in range(E):
            expected = expected + E * (chosen == e).sum().item() / 30 * scores[:, e].mean()
    loss = megablocks.batched_load_balancing_loss(args)
    assert loss.shape == ()
    torch.testing.assert_close(loss, 0.3 * expected / 2, **exact)
    weights = [layer.router.layer.weight for layer in layers]
    for got, truth in zip(
        torch.autograd.grad(loss, weights), torch.autograd.grad(0.15 * expected, weights), strict=True
    ):
        torch.testing.assert_close(got, truth, **exact)
    requests, scores = megablocks.get_load_balancing_loss()[0]
    assert (requests.dtype, scores.shape) == (torch.int32, (15, E))


def test_load_balancing_loss_wants_every_layer_once():
    args = arguments(num_layers=4)
    layer = random_layer(dMoE, args)
    x = torch.randn(1, 3, H, dtype=torch.float64)
    layer(x), layer(x)
    with pytest.raises(ValueError, match=r"2 layers saved .* make 4.*clear_load_balancing_loss"):
        megablocks.batched_load_balancing_loss(args)
    whole = dataclasses.replace(args, num_layers=2)
    half = megablocks.batched_load_balancing_loss(dataclasses.replace(args, pipeline_model_parallel_size=2))
    torch.testing.assert_close(half, megablocks.batched_load_balancing_loss(whole) / 2)
    assert megablocks.batched_load_balancing_loss(dataclasses.replace(args, num_layers_per_virtual_pipeline_stage=2))
    megablocks.clear_load_balancing_loss()
    with pytest.raises(ValueError, match="0 layers saved"):
        megablocks.batched_load_balancing_loss(whole)


def test_losses_are_saved_only_where_they_are_wanted():
    x = torch.randn(1, 3, H, dtype=torch.float64)
    unweighted = arguments(moe_loss_weight=0)
    random_layer(MoE, unweighted)(x)
    assert megablocks.batched_load_balancing_loss(unweighted) == 0.0
    random_layer(MoE, arguments()).eval()(x)
    assert megablocks.get_load_balancing_loss() == []
    with pytest.warns(UserWarning, match="moe_zloss_weight=0"):
        assert megablocks.batched_router_zloss(unweighted) == 0
    with pytest.raises(ValueError, match="no router has run"):
        megablocks.batched_router_zloss(arguments(moe_zloss_weight=0.1))


def test_router_z_loss_is_the_formula_layer_by_layer():
    args = arguments(moe_zloss_weight=0.01)
    layers, x = [random_layer(dMoE, args), random_layer(MoE, args).eval()], leaf(2, 5, H)
    expected = []
    for layer in layers:
        layer(x)
        logits = F.linear(x.view(-1, H), layer.router.layer.weight)
        expected.append(0.01 * torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean())
    loss = megablocks.batched_router_zloss(args)
    torch.testing.assert_close(loss, torch.stack(expected), **exact)
    (got,), (truth,) = torch.autograd.grad(loss.sum(), x), torch.autograd.grad(sum(expected), x)
    torch.testing.assert_close(got, truth, **exact)
    megablocks.clear_router_zloss()
    layers[0](x)
    assert len(megablocks.batched_router_zloss(args)) == 1


def test_jitter_multiplies_what_the_router_sees_in_training_alone():
    layer = random_layer(dMoE, arguments(moe_jitter_eps=0.25))
    x = torch.randn(2, 5, H, dtype=torch.float64)
    torch.manual_seed(3)
    layer(x)
    torch.manual_seed(3)
    noise = 0.75 + 0.5 * torch.rand(2, 5, H, dtype=torch.float64)
    scores = F.linear((x * noise).view(-1, H), layer.router.layer.weight).softmax(-1)
    torch.testing.assert_close(megablocks.get_load_balancing_loss()[0][1], scores, **exact)
    layer.eval()
    torch.testing.assert_close(total(layer(x)).view(-1, H), plain_layer(layer, x), **exact)
    # The experts see the clean tokens: with one expert, noise changes nothing.
    one = random_layer(dMoE, arguments(moe_jitter_eps=0.25, moe_num_experts=1, moe_top_k=1))
    torch.testing.assert_close(total(one(x)).view(-1, H), plain_layer(one, x), **exact)


# --- Precision, memory, the device ---


@pytest.mark.parametrize("kind", [MoE, dMoE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_layers_are_close_to_the_loop_in_float64(kind, dtype):
    args = arguments(
        hidden_size=16, ffn_hidden_size=8, fp16=dtype == torch.float16, bf16=True, shared_expert=True, mlp_type="glu"
    )
    layer = kind(args)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(4, 6, 16).to(dtype)
    out, bias = layer(x)
    assert (out.dtype, bias.dtype) == (dtype, dtype)
    exact_layer = kind(args).double()
    exact_layer.load_state_dict(layer.state_dict())
    truth = plain_layer(exact_layer, x.double())
    error = (out.view(-1, 16).double() - truth).norm() / truth.norm()
    assert error < 8 * torch.finfo(dtype).eps


def test_autocast_runs_everything_in_its_dtype():
    for kind in (MoE, dMoE):
        layer = kind(arguments(hidden_size=16, ffn_hidden_size=8, mlp_type="glu", shared_expert=True))
        x = torch.randn(2, 4, 16)
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), layer(x)[0], rtol=0.05, atol=0.1)
        out.float().sum().backward()
        assert {p.grad.dtype for n, p in layer.named_parameters() if n != "experts.bias"} == {torch.float32}


def test_less_memory_gives_the_same_bits_and_keeps_less():
    def run(less):
        kept = []
        torch.manual_seed(0)
        layer = dMoE(arguments(hidden_size=8, ffn_hidden_size=256, memory_optimized_mlp=less, mlp_type="glu"))
        x = torch.randn(1, 64, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            out, _ = layer(x)
        out.square().sum().backward()
        elements = {t.data_ptr(): t.numel() for t in kept}
        return out, x.grad, layer.experts.mlp.v1.grad, sum(elements.values())

    *results, normal = run(False)
    *again, reduced = run(True)
    for a, b in zip(results, again, strict=True):
        assert torch.equal(a, b)
    activation = 64 * 2 * 256
    assert normal - reduced >= 2 * activation  # act(gate), and act(gate) · up


@pytest.mark.parametrize("kind", [MoE, dMoE])
@pytest.mark.parametrize("factor", [0, 1])
def test_a_step_never_waits_for_the_device(kind, factor):
    with FakeTensorMode():  # holds no values, so that reading one raises
        args = arguments(hidden_size=16, ffn_hidden_size=8, mlp_type="glu", moe_capacity_factor=factor, bf16=True)
        layer = kind(dataclasses.replace(args, moe_zloss_weight=1.0, shared_expert=True))
        x = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        out, bias = layer(x)
        loss = megablocks.batched_load_balancing_loss(args) + (out + bias).square().sum()
        loss = loss + megablocks.batched_router_zloss(layer.args).sum()
        loss.backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None for p in layer.parameters())


def test_a_layer_compiles_to_one_graph():
    args = arguments(hidden_size=16, ffn_hidden_size=8, mlp_type="glu", bf16=True)
    layer, results = dMoE(args), []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)
        x = torch.randn(4, 8, 16, dtype=torch.bfloat16, requires_grad=True)
        out, bias = function(x)
        ((out + bias).float().square().sum() + megablocks.batched_load_balancing_loss(args)).backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
        layer.zero_grad()
        megablocks.clear_load_balancing_loss()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_same_input_gives_the_same_bits():
    for layer in (MoE(arguments()), dMoE(arguments())):
        x = torch.randn(4, 9, H)
        runs = []
        for _ in range(2):
            layer.zero_grad()
            out, _ = layer(x)
            out.square().sum().backward()
            runs.append([out, *(p.grad for p in layer.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_tokens_that_are_no_numbers_leave_the_others_alone():
    for layer in (random_layer(MoE, arguments()), random_layer(dMoE, arguments())):
        x = torch.randn(1, 8, H, dtype=torch.float64)
        clean, _ = layer(x)
        megablocks.clear_load_balancing_loss()
        x[0, -1] = math.nan  # the last token, which leaves no place that another would have had
        out, _ = layer(x)
        torch.testing.assert_close(out[0, :-1], clean[0, :-1], **exact)
        assert megablocks.get_load_balancing_loss()[0][0].sum() == 14


def test_uniform_assignment_deals_the_experts_out():
    layer, x = chooser(MoE, [[0, 1, 2, 3]] * 4, args={"uniform_expert_assignment": True})
    scores = torch.tensor([0.0, -1.0], dtype=torch.float64).exp() / torch.arange(-3.0, 1).double().exp().sum()
    first, second = torch.tensor([1.0, 3.0, 1.0, 3.0]).double(), torch.tensor([2.0, 4.0, 2.0, 4.0]).double()
    torch.testing.assert_close(layer(x)[:, 0], torch.diag(first * scores[0] + second * scores[1]), **exact)
    assert megablocks.get_load_balancing_loss()[0][0].tolist() == [2, 2, 2, 2]


# --- Arguments ---


def test_defaults_are_those_of_megablocks():
    given = {field.name: getattr(Arguments(), field.name) for field in dataclasses.fields(Arguments)}
    functions = {name: given.pop(name) for name in ("activation_fn", "init_method", "output_layer_init_method")}
    assert given == {
        "hidden_size": 1024,
        "ffn_hidden_size": 4096,
        "num_layers": 1,
        "bias": True,
        "return_bias": True,
        "moe_num_experts": 1,
        "moe_top_k": 1,
        "moe_capacity_factor": 1,
        "moe_normalize_expert_weights": None,
        "moe_loss_weight": 0.1,
        "moe_jitter_eps": None,
        "moe_lbl_in_fp32": False,
        "moe_expert_model_parallelism": False,
        "expert_parallel_group": None,
        "pipeline_model_parallel_size": 1,
        "num_layers_per_virtual_pipeline_stage": None,
        "memory_optimized_mlp": False,
        "mlp_type": "mlp",
        "mlp_impl": "grouped",
        "fp16": True,
        "bf16": False,
        "device": torch.device("cpu") if not torch.cuda.is_available() else torch.cuda.current_device(),
        "uniform_expert_assignment": False,
        "shared_expert": False,
        "fc_cls": torch.nn.Linear,
        "fc_kwargs": {},
        "remat_act_fn": True,
        "shared_expert_hidden_size": 4096,
        "shared_expert_weighted_sum": False,
        "moe_zloss_weight": 0,
        "moe_zloss_in_fp32": False,
    }
    x = torch.randn(9)
    assert torch.equal(functions["activation_fn"](x), F.gelu(x, approximate="tanh"))
    for name in ("init_method", "output_layer_init_method"):
        assert functions[name].keywords == {"mean": 0.0, "std": 0.02}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_expert_model_parallelism": True}, "moe_expert_model_parallelism is True; only False"),
        ({"expert_parallel_group": "group"}, "expert_parallel_group is 'group'; only None"),
        ({"mlp_type": "swiglu"}, "mlp_type is 'swiglu'; it must be 'mlp' or 'glu'"),
        ({"mlp_impl": "dense"}, "mlp_impl is 'dense'; it must be 'grouped' or 'sparse'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"moe_num_experts": 2, "moe_top_k": 3}, "moe_top_k is 3"),
        ({"moe_capacity_factor": -1}, "moe_capacity_factor is -1"),
        ({"activation_fn": None}, "activation_fn is None"),
        ({"pipeline_model_parallel_size": 0}, "pipeline_model_parallel_size is 0"),
    ],
)
def test_arguments_refuse_what_is_not_supported(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_layers_refuse_other_words_and_widths():
    with pytest.raises(TypeError, match="moe_experts"):
        Arguments(moe_experts=3)
    with pytest.raises(ValueError, match="overflow is 'keep'"):
        MoE(arguments(), overflow="keep")
    with pytest.raises(ValueError, match=rf"\(2, 3, {H + 1}\); its last dimension must be {H}"):
        dMoE(arguments())(torch.zeros(2, 3, H + 1))


def test_arguments_of_another_library_are_taken():
    @dataclasses.dataclass
    class Theirs:
        hidden_size: int = H
        ffn_hidden_size: int = Fh
        moe_num_experts: int = E
        moe_top_k: int = 1
        fp16: bool = False
        device: str = "cpu"
        quantize_inputs_num_bits: int = -1
        mlp_type: str = "glu"

    layer = dMoE(Theirs())
    assert (layer.args.moe_top_k, layer.args.mlp_type, layer.args.moe_loss_weight) == (1, "glu", 0.1)
    with pytest.raises(ValueError, match="quantize_inputs_num_bits is 8; only its default, -1"):
        dMoE(Theirs(quantize_inputs_num_bits=8))
    with pytest.raises(ValueError, match="mlp_type is 'none'"):
        MoE(Theirs(mlp_type="none"))


def test_shared_expert_is_made_of_the_given_class():
    made = []

    class Layer(torch.nn.Linear):
        def __init__(self, *sizes, bias, device, extra):
            made.append((sizes, bias, device, extra))
            super().__init__(*sizes, bias=bias, device=device)

    dMoE(arguments(shared_expert=True, mlp_type="glu", fc_cls=Layer, fc_kwargs={"extra": 3, "bias": False}))
    assert sorted(made) == sorted([((H, Fh), False, "cpu", 3), ((Fh, H), False, "cpu", 3), ((H, Fh), False, "cpu", 3)])


@pytest.mark.parametrize("kind", [MoE, dMoE])
def test_training_lowers_the_loss(kind):
    args = arguments(mlp_type="glu", moe_capacity_factor=2, moe_loss_weight=0.01, moe_zloss_weight=1e-3)
    layer = kind(args)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x = torch.randn(4, 16, H)
    target = x.flip(-1).tanh()
    losses = []
    for _ in range(40):
        out, bias = layer(x)
        losses.append(F.mse_loss(out + bias, target))
        extra = megablocks.batched_load_balancing_loss(args) + megablocks.batched_router_zloss(args).sum()
        optimizer.zero_grad()
        (losses[-1] + extra).backward()
        optimizer.step()
        megablocks.clear_load_balancing_loss()
        megablocks.clear_router_zloss()
    assert losses[-1] < 0.5 * losses[0]


def test_every_public_name_is_there():
    assert all(hasattr(megablocks, name) for name in megablocks.__all__)
    signatures = itertools.chain(
        [(ops.gather, "x indices bin_ids bins top_k"), (ops.scatter, "x indices bin_ids weights bins top_k")],
        [(ops.binned_gather, "x indices bins bin_size top_k"), (ops.binned_scatter, "x indices weights bins top_k")],
        [(ops.histogram, "x max_val"), (ops.sort, "x end_bit"), (ops.inclusive_cumsum, "x dim")],
        [(ops.exclusive_cumsum, "x dim")],
    )
    for function, names in signatures:
        assert " ".join(function.__code__.co_varnames[: function.__code__.co_argcount]) == names
        assert getattr(megablocks, function.__name__) is function
