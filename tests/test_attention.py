"""Attention weights against torch's own, the formula by hand, and the eager attention of transformers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from trainbook.attention import attention_weights
from trainbook.plots import MAX_HEADS, MAX_LAYERS, draw_attention, to_png


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def assert_sums_to_one(weights):
    close(weights.sum(-1), torch.ones(weights.shape[:-1]))


# nn.MultiheadAttention


class Cross(nn.Module):
    """Multi-head attention that is asked for what a model may ask for."""

    def __init__(self, **choices):
        super().__init__()
        torch.manual_seed(1)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, dropout=0.5, **choices)

    def forward(self, query, key, **asked):
        self.returned = self.attention(query, key, key, **asked)
        return self.returned[0]


# For nn.MultiheadAttention True hides a key, for scaled_dot_product_attention it shows it: each query has keys of both kinds.
PATTERN = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("asked", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("mask", [None, PATTERN, noise(4, 5)])
@pytest.mark.parametrize("choices", [{}, {"add_zero_attn": True, "add_bias_kv": True}, {"kdim": 6, "vdim": 6, "bias": False}])
def test_multi_head_attention_matches_the_weights_that_torch_returns(choices, mask, asked):
    module, query, key = Cross(**choices), noise(2, 4, 12), noise(2, 5, choices.get("kdim", 12), seed=1)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True]])
    options = {"attn_mask": mask, "key_padding_mask": padding if mask is None else None}
    module.eval()
    expected = module.attention(query, key, key, average_attn_weights=False, **options)[1]
    output, returned = module.attention(query, key, key, **options, **asked)
    module.train()
    found = attention_weights(module, query, key, **options, **asked)
    assert list(found) == ["attention"]
    close(found["attention"], expected)
    assert_sums_to_one(found["attention"])
    assert torch.equal(module.returned[0], output)
    assert module.returned[1] is returned is None or torch.equal(module.returned[1], returned)


def test_a_query_that_may_attend_to_nothing_spoils_neither_the_run_nor_the_picture():
    module, hidden = Cross(), PATTERN.clone()
    hidden[1] = True
    found = attention_weights(module, noise(2, 4, 12), noise(2, 5, 12), attn_mask=hidden, need_weights=False)
    assert module.returned[0].isfinite().all()
    assert found["attention"][:, :, 1].isnan().all()
    assert_sums_to_one(found["attention"][:, :, [0, 2, 3]])
    figure = draw_attention(found)
    assert panels_of(figure)[0].images[0].get_clim()[1] == float(found["attention"][0].nan_to_num().max())
    to_png(figure)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
def test_self_attention_alone_with_and_without_a_batch(shape):
    attention, tokens = nn.MultiheadAttention(8, 2, batch_first=True).eval(), noise(*shape)
    expected = attention(tokens, tokens, tokens, average_attn_weights=False)[1]
    found = attention_weights(attention, tokens, tokens, tokens, need_weights=False)
    close(found, {"MultiheadAttention": expected.view(-1, 2, 5, 5)})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_encoder_of_torch_is_seen_also_where_it_takes_its_fast_path(training, norm_first):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).train(training)
    tokens, padding = noise(3, 6, 12), torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
    found = attention_weights(encoder, tokens, src_key_padding_mask=padding)
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]
    encoder.eval()
    for block, weights in zip(encoder.layers, found.values(), strict=True):
        entering = block.norm1(tokens) if norm_first else tokens
        close(weights, block.self_attn(entering, entering, entering, padding, average_attn_weights=False)[1])
        assert_sums_to_one(weights)
        assert not weights.masked_select(padding[:, None, None]).any()
        with torch.enable_grad():  # the slow path, by torch's own rule
            tokens = block(tokens, src_key_padding_mask=padding).detach()


def test_a_decoder_has_causal_attention_to_itself_and_attention_to_the_encoder():
    torch.manual_seed(3)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8, batch_first=True), 1)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    found = attention_weights(decoder, noise(2, 4, 8), noise(2, 3, 8), tgt_mask=causal, tgt_is_causal=True)
    assert {name: weights.shape for name, weights in found.items()} == {
        "layers.0.self_attn": (2, 2, 4, 4),
        "layers.0.multihead_attn": (2, 2, 4, 3),
    }
    assert not found["layers.0.self_attn"].triu(1).any()


# scaled_dot_product_attention


class Dot(nn.Module):
    def forward(self, *tensors, **options):
        return functional.scaled_dot_product_attention(*tensors, **options)


def by_hand(query, key, bias, scale):
    """softmax(scale q.k + bias), one row at a time."""
    num_batch, num_heads, num_queries, _ = query.shape
    weights = torch.zeros(num_batch, num_heads, num_queries, key.shape[2])
    group = num_heads // key.shape[1]
    for b, h, q in np.ndindex(num_batch, num_heads, num_queries):
        scores = [float(query[b, h, q] @ one) * scale for one in key[b, h // group]]
        biases = bias.expand(num_batch, num_heads, -1, -1)[b, h, q].tolist()
        terms = [math.exp(score + more) for score, more in zip(scores, biases, strict=True)]
        weights[b, h, q] = torch.tensor(terms) / sum(terms)
    return weights


NOTHING = torch.zeros(4, 5)
HIDDEN = NOTHING.masked_fill(~PATTERN, -math.inf)
MASKS = {
    "none": ({}, NOTHING),
    "scale": ({"scale": 0.3}, NOTHING),
    "dropout": ({"dropout_p": 0.9}, NOTHING),
    "causal": ({"is_causal": True}, NOTHING.masked_fill(torch.ones(4, 5).triu(1).bool(), -math.inf)),
    "causal at the lower right": (
        {"attn_mask": causal_lower_right(4, 5)},
        NOTHING.masked_fill(torch.ones(4, 5).triu(2).bool(), -math.inf),
    ),
    "bool": ({"attn_mask": PATTERN}, HIDDEN),
    "float": ({"attn_mask": noise(2, 1, 4, 5, seed=5)}, noise(2, 1, 4, 5, seed=5)),
}


@pytest.mark.parametrize("grouped", [False, True], ids=["one key per head", "shared keys"])
@pytest.mark.parametrize(("options", "bias"), MASKS.values(), ids=MASKS)
def test_dot_product_attention_is_the_formula(options, bias, grouped):
    query, key, value = (
        noise(2, 4, 4, 3),
        noise(2, 2 if grouped else 4, 5, 3, seed=1),
        noise(2, 2 if grouped else 4, 5, 7, seed=2),
    )
    expected = by_hand(query, key, bias, options.get("scale", 3**-0.5))
    module, outputs = Dot(), []
    module.register_forward_hook(lambda part, inputs, output: outputs.append(output))
    for run in (module, lambda *inputs, **options: attention_weights(module, *inputs, **options)):
        torch.manual_seed(7)  # for dropout
        found = run(query, key, value, **options, enable_gqa=grouped)
    close(found, {"Dot": expected})
    assert_sums_to_one(found["Dot"])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 3, 2, 5, 3)])
def test_dimensions_between_batch_and_queries_count_as_heads(shape):
    tokens = noise(*shape)
    expected = (tokens @ tokens.mT * 3**-0.5).softmax(-1)
    found = attention_weights(Dot(), tokens, tokens, tokens)["Dot"]
    close(found, expected.view(shape[0] if len(shape) > 2 else 1, math.prod(shape[1:-2]), 5, 5))


def test_weights_are_seen_also_where_only_a_fused_kernel_may_run():
    query, key, value = noise(2, 2, 5, 8), noise(2, 2, 5, 8, seed=1), noise(2, 2, 5, 8, seed=2)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = attention_weights(Dot(), query, key, value)
    close(found, {"Dot": (query @ key.mT * 8**-0.5).softmax(-1)})


# transformers


def bert():
    return BertModel(BertConfig(hidden_size=24, num_attention_heads=4, num_hidden_layers=3, intermediate_size=16, vocab_size=50))


def llama(num_key_value_heads):
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 16, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=num_key_value_heads))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (bert, "encoder.layer.{}.attention.self"),
        (lambda: llama(4), "model.layers.{}.self_attn"),
        (lambda: llama(2), "model.layers.{}.self_attn"),
    ],
    ids=["bert", "llama", "llama with grouped heads"],
)
def test_transformers_matches_its_own_eager_attention(make, name, padded):
    torch.manual_seed(4)
    model, tokens = make().eval(), torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(7) < torch.tensor([7, 5])[:, None]).long() if padded else None
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    found = attention_weights(model.train(), input_ids=tokens, attention_mask=mask)
    close(found, {name.format(layer): weights for layer, weights in enumerate(expected)})
    assert_sums_to_one(torch.stack(list(found.values())))
    assert len(found) == model.config.num_hidden_layers


def test_attention_that_cannot_be_seen_is_an_error_with_a_remedy():
    model = bert()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"BertModel .* model\.set_attn_implementation\(.sdpa.\)"):
        attention_weights(model, torch.tensor([[1, 2]]))


# The module is as before


class Tied(nn.Module):
    """One encoder layer run three times, with everything that a run could disturb."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.Dropout(0.5).eval()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.calls = []

    def forward(self, tokens, fails=False):
        tokens = self.norm(tokens.mT).mT
        tokens = self.layer(self.layer(self.layer(tokens)))
        self.calls.append((self.training, torch.is_grad_enabled()))
        if fails:
            self.layer.linear1(tokens[..., :3])
        return self.frozen(tokens)


def traces(module):
    """Everything a run may leave behind: modes, hooks, buffers and weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    parts = [(part.training, *(len(getattr(part, kind)) for kind in hooks)) for part in module.modules()]
    return parts, {name: tensor.tolist() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_module_or_of_torch_changes(training, fails):
    module, tokens = Tied().train(training), noise(2, 4, 8)
    module.frozen.eval()
    twin, before = copy.deepcopy(module), traces(module)
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            attention_weights(module, tokens, fails=True)
    else:
        assert list(attention_weights(module, tokens)) == ["layer.self_attn", "layer.self_attn:2", "layer.self_attn:3"]
    assert module.calls == [(False, False)]
    assert traces(module) == before
    outputs = []
    for one in (module, twin):
        torch.manual_seed(6)
        outputs.append(one(tokens))
    assert torch.equal(*outputs)
    assert outputs[0].requires_grad
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


class Patient(nn.Module):
    """Tries an attention that fails, then another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(6, 2)

    def forward(self, tokens):
        try:
            return self.first(tokens, tokens, tokens)
        except AssertionError:
            return self.second(tokens, tokens, tokens)[0] + functional.scaled_dot_product_attention(tokens, tokens, tokens)


def test_names_are_right_after_an_error_that_the_module_survives():
    assert list(attention_weights(Patient(), noise(3, 2, 6))) == ["second", "Patient"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_module_is_seen_and_stays_compiled(in_place):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    module, tokens = Dot(), noise(2, 2, 4, 8)
    expected = attention_weights(module, tokens, tokens, tokens)
    compiled = module if in_place else torch.compile(module, backend=backend)
    if in_place:
        module.compile(backend=backend)
    compiled(tokens, tokens, tokens)
    num_graphs = len(graphs)
    close(attention_weights(compiled, tokens, tokens, tokens), expected)
    compiled(tokens, tokens, tokens)
    assert len(graphs) == num_graphs > 0


# The picture


def example_weights(num_layers=2, num_heads=3, num_queries=4, num_keys=5):
    return {f"layers.{i}": noise(2, num_heads, num_queries, num_keys, seed=i).softmax(-1) for i in range(num_layers)}


def panels_of(figure):
    return [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


def test_every_panel_shows_its_head_on_one_scale_with_named_axes():
    weights = example_weights()
    figure = draw_attention(weights, example=1)
    expected = [(f"layers.{layer}", head) for layer in range(2) for head in range(3)]
    assert len(panels_of(figure)) == 6
    top = max(float(one[1].max()) for one in weights.values())
    for (name, head), panel in zip(expected, panels_of(figure), strict=True):
        (picture,) = panel.images
        np.testing.assert_array_equal(picture.get_array(), weights[name][1, head].numpy())
        assert picture.get_clim() == pytest.approx((0, top))
        assert picture.origin == "upper"
        assert panel.get_title(loc="left") == (f"{name}\nhead 0" if head == 0 else f"head {head}")
        assert panel.get_ylabel() == ("query" if head == 0 else "")
        assert panel.get_xlabel() == ("key" if name == "layers.1" else "")
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "attention weight"
    assert figure.get_suptitle() == ""


def labels(axis):
    return [(tick.get_loc(), tick.label1.get_text()) for tick in axis.get_major_ticks()]


def test_tokens_stand_at_the_axes_of_their_number():
    tokens = ["the", "$_$", "$", "##ing", "[SEP]"]
    figure = draw_attention(example_weights(), tokens)
    corner = panels_of(figure)[3]
    assert labels(corner.xaxis) == list(enumerate(tokens))
    assert labels(corner.yaxis) == [(position, str(position)) for position in range(4)]
    to_png(figure)  # no token is taken for an equation
    with pytest.raises(ValueError, match=r"6 tokens, .* \[4, 5\]"):
        draw_attention(example_weights(), ["a"] * 6)


def test_long_texts_keep_every_nth_label():
    tokens = [f"t{position}" for position in range(60)]
    corner = panels_of(draw_attention(example_weights(1, 1, 60, 60), tokens))[0]
    assert labels(corner.xaxis) == labels(corner.yaxis) == [(position, f"t{position}") for position in range(0, 60, 3)]


def test_what_does_not_fit_is_left_out_and_said():
    figure = draw_attention(example_weights(MAX_LAYERS + 3, MAX_HEADS + 1))
    assert len(panels_of(figure)) == MAX_LAYERS * MAX_HEADS
    assert figure.get_suptitle() == f"the first {MAX_LAYERS} of {MAX_LAYERS + 3} operations, {MAX_HEADS} of {MAX_HEADS + 1} heads"


def test_operations_may_differ_in_heads_keys_and_type():
    weights = {"self": noise(1, 3, 4, 4).softmax(-1).bfloat16(), "cross": noise(1, 2, 4, 6).softmax(-1)}
    figure = draw_attention(weights)
    assert [panel.get_xlabel() for panel in panels_of(figure)] == ["key"] * 5
    with pytest.raises(ValueError, match="no attention"):
        draw_attention({})
