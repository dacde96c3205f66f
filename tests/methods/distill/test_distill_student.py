"""Students: their sizes, what they take from the target, and their way through an artifact."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

import accel
from accel.artifacts import Manifest, describe_base, save
from accel.drafters.small_lm import VocabularyMap
from accel.errors import IncompatibleError, OptionError
from accel.methods.speculative.distill.student import Shape, build, num_parameters, project, truncate, weights

LLAMA_LIKE = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2"]
KEPT = [0, 2, *range(5, 67, 2)]
SMALL = Shape(layers=1, hidden=16, heads=2, kv_heads=1, intermediate=24)
PROMPT = torch.tensor([[5, 9, 2, 11, 7, 31, 5]])


@pytest.fixture
def vocabulary():
    return VocabularyMap(torch.tensor(KEPT), 0, 67)


def inner(rows: torch.Tensor) -> torch.Tensor:
    return rows @ rows.T


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_the_shape_of_layers_has_their_sizes(tiny, family):
    target = tiny.build(family)
    alike = build(target, Shape.of_layers(target, 1), None, start="random")
    assert alike.num_parameters() == truncate(target, [0], None).num_parameters()


def test_shapes_read_as_they_are_written():
    assert Shape.parse("1x256") == Shape(1, 256, 4, 4, 704)
    assert Shape.parse("30x576") == Shape(30, 576, 9, 9, 1536)
    assert Shape.parse("2x96") == Shape(2, 96, 3, 3, 256)
    assert Shape.parse("1x16x2x1x24") == SMALL == Shape.parse(str(SMALL))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("256", "give LAYERSxHIDDEN"),
        ("1x2x3", "give LAYERSxHIDDEN"),
        ("1x-8", "give LAYERSxHIDDEN"),
        ("1x100", "multiple of 8"),
        ("0x64", "1 or more"),
        ("1x64x3x1x8", "divide into 3 heads"),
        ("1x64x64x1x8", "even size"),
        ("1x64x4x3x8", "4 heads do not share 3"),
    ],
)
def test_shapes_that_cannot_be(text, says):
    with pytest.raises(OptionError, match=says):
        Shape.parse(text)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [SMALL, Shape(3, 24, 3, 3, 40)])
def test_parameters_are_counted_as_they_are(tiny, vocabulary, shape, tied):
    student = build(tiny.build("llama"), shape, vocabulary, tied=tied)
    assert student.num_parameters() == num_parameters(shape, len(KEPT), tied=tied)


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_a_student_has_the_shape_asked_for_in_every_llama_like_family(tiny, vocabulary, family):
    student = build(tiny.build(family), Shape(1, 16, 4, 2, 24), vocabulary)
    config = student.config
    assert config.model_type == family
    found = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert (*found, config.intermediate_size) == (1, 16, 4, 2, 24)
    attention = student.get_decoder().layers[0].self_attn
    assert attention.head_dim == 4 and attention.scaling == pytest.approx(0.5)
    assert student(torch.arange(9)[None]).logits.shape == (1, 9, len(KEPT))
    assert not student.training and student.dtype == torch.float32


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "bloom"])
def test_other_families_are_refused_by_name(tiny, family):
    for make in (lambda t: build(t, SMALL, None), lambda t: truncate(t, [0], None)):
        with pytest.raises(IncompatibleError, match=f"{family} has no .* in its config"):
            make(tiny.build(family))


def test_the_same_width_copies_the_rows(tiny, vocabulary):
    target = tiny.build("llama")
    student = build(target, Shape(1, 32, 4, 2, 48), vocabulary)
    assert torch.equal(student.get_input_embeddings().weight, target.get_input_embeddings().weight[KEPT])
    assert torch.equal(student.get_output_embeddings().weight, target.get_output_embeddings().weight[KEPT])
    assert target.config.vocab_size == 67


def test_a_smaller_width_keeps_what_rows_have_in_common(tiny):
    target = tiny.build("llama")
    with torch.no_grad():
        # as in real models: a few directions carry most
        for end in (target.get_input_embeddings(), target.get_output_embeddings()):
            end.weight *= 0.8 ** torch.arange(32)
    started = build(target, SMALL, None)
    random = build(target, SMALL, None, start="random")
    for which in ("get_input_embeddings", "get_output_embeddings"):
        theirs = inner(getattr(target, which)().weight)
        alike = [
            torch.corrcoef(torch.stack([theirs.flatten(), inner(getattr(each, which)().weight).flatten()]))[0, 1]
            for each in (started, random)
        ]
        assert alike[0] > 0.999 and alike[1] < 0.6


@pytest.mark.parametrize("width", [5, 8, 12, 20])
def test_inner_products_survive_where_the_width_reaches_the_rank(width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator) @ torch.randn(5, 12, generator=generator)
    found = project(rows, width)
    assert found.shape == (40, width)
    torch.testing.assert_close(found.square().mean(), rows.square().mean())
    # the RMS of entries is kept, so fewer of them make shorter rows
    torch.testing.assert_close(inner(found), inner(rows) * width / 12, atol=1e-3, rtol=1e-3)


def test_rows_are_projected_as_well_as_can_be():
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    found = project(rows, 4)
    s = torch.linalg.svdvals(rows)[:4]
    # up to scale, the projection's singular values are the largest ones
    torch.testing.assert_close(torch.linalg.svdvals(found) / found.norm(), s / s.norm())


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("of_tied", [True, False])
def test_ends_are_tied_as_asked(tiny, of_tied, tied):
    target = tiny.build("llama", tie_word_embeddings=of_tied)
    student = build(target, SMALL, None, tied=tied)
    shared = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert shared == (of_tied if tied is None else tied)
    assert ("lm_head.weight" in weights(student)) != shared


def test_random_layers_follow_the_seed_and_nobody_elses_randomness(tiny):
    target = tiny.build("llama")
    state = torch.get_rng_state()
    one, same, other = (build(target, SMALL, None, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    layer = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one[layer], same[layer]) and not torch.equal(one[layer], other[layer])
    assert torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_all_layers_make_the_target_itself(tiny, vocabulary, family, tied):
    target = tiny.build(family, tie_word_embeddings=tied)
    expected = target(PROMPT).logits
    whole = truncate(target, [0, 1], None)
    torch.testing.assert_close(whole(PROMPT).logits, expected)
    trimmed = truncate(target, [0, 1], vocabulary)
    torch.testing.assert_close(trimmed(vocabulary.t2d()[PROMPT]).logits, expected[..., KEPT])


def test_chosen_layers_are_the_targets_own_and_copies(tiny):
    target = tiny.build("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    student = truncate(target, [3, 0], None)
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    theirs, ours = (each.get_decoder() for each in (target, student))
    for mine, layer in enumerate([3, 0]):
        for name, weight in ours.layers[mine].state_dict().items():
            assert torch.equal(weight, theirs.layers[layer].state_dict()[name])
    assert torch.equal(ours.norm.weight, theirs.norm.weight)
    before = theirs.layers[0].mlp.up_proj.weight.clone()
    with torch.no_grad():
        for weight in student.parameters():
            weight.zero_()
    assert torch.equal(theirs.layers[0].mlp.up_proj.weight, before)


def test_a_new_student_sees_the_whole_context_where_the_target_can(tiny):
    student = build(tiny.build("gemma3_text"), Shape(3, 16, 2, 1, 24), None)
    assert student.config.layer_types == ["full_attention"] * 3


def test_a_target_in_half_precision_has_students_in_single(tiny):
    target = tiny.build("llama").bfloat16()
    for student in (build(target, SMALL, None), truncate(target, [1], None)):
        assert student.dtype == torch.float32
        assert all(weight.isfinite().all() for weight in student.parameters())


def test_token_ids_are_the_drafts_or_none(tiny, vocabulary):
    target = tiny.build("llama", eos_token_id=[2, 3, 5], unk_token_id=0)
    for student in (build(target, SMALL, vocabulary), truncate(target, [0], vocabulary)):
        config = AutoConfig.for_model(**student.config.to_dict())
        assert config.vocab_size == len(KEPT)
        assert config.eos_token_id == [1, 2]
        # 1 was not kept; padding is what no row is trained for
        assert config.bos_token_id is None and config.pad_token_id is None
        assert config.unk_token_id == 0
    assert build(target, SMALL, None).config.eos_token_id == [2, 3, 5]


def test_every_row_of_a_student_can_learn(tiny):
    student = build(tiny.build("llama"), SMALL, None)
    student(torch.arange(67)[None]).logits.logsumexp(-1).sum().backward()
    gradient = student.get_input_embeddings().weight.grad
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("kind", ["built", "truncated"])
def test_students_go_through_an_artifact(tiny, tmp_path, vocabulary, kind, trimmed, tied):
    target = tiny.build("llama", tie_word_embeddings=tied)
    kept = vocabulary if trimmed else None
    student = build(target, SMALL, kept) if kind == "built" else truncate(target, [0, 1], kept)
    files = {"model.safetensors": weights(student)}
    parameters = {"config": student.config.to_dict()}
    if trimmed:
        files["vocabulary.safetensors"] = {"d2t": vocabulary.d2t}
        parameters["unknown"] = vocabulary.unknown
    manifest = Manifest(kind="draft", base=describe_base(target.config, name="tiny"), parameters=parameters)
    artifact = save(tmp_path / "draft", manifest, files)
    prompt = tiny.prompts(2) | {"max_new_tokens": 12}
    out = accel.generate(target, artifacts=[artifact], drafter="lm", draft_length=3, **prompt)
    tiny.assert_similar(out, tiny.reference(target, **prompt))
    accepted = accel.stats(target).acceptance_rate
    assert accel.stats(target).drafted_tokens > 0
    # a truncated student with all layers and tokens is the target
    assert kind == "built" or trimmed or accepted > 0.9


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: build(t, SMALL, None, start="zero"), OptionError, "unknown start 'zero'"),
        (lambda t: truncate(t, [], None), OptionError, "choose one or more of the target's 0 to 1"),
        (lambda t: truncate(t, [2], None), OptionError, r"layers=\[2\]"),
        (lambda t: build(t, SMALL, VocabularyMap(torch.arange(4), 0, 9)), IncompatibleError, "from 9 tokens"),
    ],
)
def test_refusals(tiny, call, error, says):
    with pytest.raises(error, match=says):
        call(tiny.build("llama"))


def test_a_mixture_of_experts_is_refused(tiny):
    with pytest.raises(IncompatibleError, match="mixture of experts"):
        build(tiny.build("llama", num_local_experts=4), SMALL, None)
