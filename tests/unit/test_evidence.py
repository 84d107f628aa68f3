import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from foldsearch.codec import from_json, to_json
from foldsearch.errors import InputError
from foldsearch.model.blocks import decoder_blocks
from foldsearch.model.evidence import (
    BlockRun,
    Evidence,
    GreedyResult,
    attention_order,
    best_window,
    greedy_order,
    influence_order,
    measure_evidence,
    next_token_losses,
)
from foldsearch.model.head import head_logits, last_hidden
from tests.tiny import as_tokens, dense_model

NUM_BLOCKS = 5


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def ids_NT() -> Tensor:
    return torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))


def states_by_hand(dense: LlamaForCausalLM, ids_NT: Tensor) -> list[Tensor]:
    """The residual stream, block by block, without the final norm."""
    model = dense.model
    hidden_NTD = model.embed_tokens(ids_NT)
    position_NT = torch.arange(ids_NT.shape[1])[None]
    rotary = model.rotary_emb(hidden_NTD, position_NT)
    states = [hidden_NTD]
    for block in model.layers:
        hidden_NTD = block(hidden_NTD, position_embeddings=rotary, attention_mask=None)
        states.append(hidden_NTD)
    return states


def without(dense: LlamaForCausalLM, dropped: list[int], ids_NT: Tensor, front: int = 0) -> float:
    blocks = dense.model.layers
    try:
        dense.model.layers = nn.ModuleList(b for i, b in enumerate(blocks) if i not in dropped)
        logits_NTV = dense(ids_NT, use_cache=False).logits
    finally:
        dense.model.layers = blocks
    first = max(front - 1, 0)  # the last token in front predicts the first one of the text
    return float(
        nn.functional.cross_entropy(logits_NTV[:, first:-1].flatten(0, 1), ids_NT[:, first + 1 :].flatten())
    )


def cosine(a: Tensor, b: Tensor) -> float:
    return float(nn.functional.cosine_similarity(a, b, dim=-1).mean())


@pytest.mark.parametrize("front", [0, 2])
def test_cosines_equal_those_of_the_states_before_the_final_norm(
    dense: LlamaForCausalLM, ids_NT: Tensor, front: int
) -> None:
    """What stands in front of a text runs, but its cosines do not count."""
    seen: list[tuple[int, int]] = []
    tokens = as_tokens(ids_NT, front)
    evidence = measure_evidence(dense, tokens, batch_size=2, progress=lambda *at: seen.append(at))
    states = [state[:, front:] for state in states_by_hand(dense, ids_NT)]
    for first in range(NUM_BLOCKS):
        for length in range(1, NUM_BLOCKS - first + 1):
            assert evidence.window_cosine[first][length - 1] == pytest.approx(
                cosine(states[first], states[first + length]), abs=1e-5
            )
        assert len(evidence.window_cosine[first]) == NUM_BLOCKS - first
        assert evidence.block_cosine[first] == evidence.window_cosine[first][0]
        assert evidence.start_cosine[first] == evidence.window_cosine[0][first]
    for i, block in enumerate(dense.model.layers):
        added: list[Tensor] = []
        handle = block.self_attn.register_forward_hook(lambda _m, _a, out, kept=added: kept.append(out[0]))
        dense.model(ids_NT)
        handle.remove()
        assert evidence.attention_cosine[i] == pytest.approx(
            cosine(states[i], states[i] + added[0][:, front:]), abs=1e-5
        )
    assert evidence.tokens == ids_NT[:, front:].numel()
    assert seen == [(2, 3), (3, 3)]


def test_what_attention_adds_counts_with_granites_multiplier(ids_NT: Tensor) -> None:
    """Oracle: the norm of the MLP reads the stream after the attention."""
    granite = dense_model("granite")
    evidence = measure_evidence(granite, as_tokens(ids_NT))
    for i, block in enumerate(decoder_blocks(granite)):
        states: list[Tensor] = []
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, states=states: states.append(args[0])
            )
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        granite.model(ids_NT)
        for hook in hooks:
            hook.remove()
        assert evidence.attention_cosine[i] == pytest.approx(cosine(*states), abs=1e-5)


def test_measuring_leaves_no_hook_behind(dense: LlamaForCausalLM, ids_NT: Tensor) -> None:
    measure_evidence(dense, as_tokens(ids_NT))
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in dense.model.layers)


def test_rankings_of_known_evidence() -> None:
    evidence = Evidence(
        block_cosine=(0.1, 0.9, 0.7, 0.9),
        start_cosine=(0.1, 0.2, 0.3, 0.4),
        window_cosine=((0.1, 0.5, 0.2, 0.0), (0.9, 0.6, 0.3), (0.7, 0.8), (0.9,)),
        attention_cosine=(0.5, 0.9, 0.99, 0.9),
        tokens=7,
    )
    assert influence_order(evidence) == (1, 3, 2, 0)
    assert attention_order(evidence) == (2, 1, 3, 0)
    assert best_window(evidence, 1) == (1,)
    assert best_window(evidence, 2) == (2, 3)
    assert best_window(evidence, 3) == (1, 2, 3)
    assert from_json(Evidence, to_json(evidence)) == evidence
    with pytest.raises(InputError, match="From 1 to 4 blocks"):
        best_window(evidence, 5)


@pytest.mark.parametrize("front", [0, 3])
def test_exact_greedy_equals_brute_force(dense: LlamaForCausalLM, ids_NT: Tensor, front: int) -> None:
    result = greedy_order(dense, as_tokens(ids_NT, front), 3, exact=True)
    order: list[int] = []
    for loss in result.losses:
        losses = {i: without(dense, [*order, i], ids_NT, front) for i in range(NUM_BLOCKS) if i not in order}
        order.append(min(losses, key=lambda i: losses[i]))
        assert loss == pytest.approx(losses[order[-1]], abs=1e-5)
    assert result.order == tuple(order)
    assert result.dense_loss == pytest.approx(without(dense, [], ids_NT, front), abs=1e-5)
    assert from_json(GreedyResult, to_json(result)) == result


def test_lazy_greedy_finds_planted_redundancy_with_fewer_runs(
    dense: LlamaForCausalLM, ids_NT: Tensor
) -> None:
    for planted in (1, 3):
        dense.model.layers[planted].self_attn.o_proj.weight.zero_()
        dense.model.layers[planted].mlp.down_proj.weight.zero_()
    # The loss of a random model means nothing; make it say something, so that other removals cost.
    ids_NT = dense(ids_NT, use_cache=False).logits.argmax(-1)
    lazy, exact = (greedy_order(dense, as_tokens(ids_NT), 2, exact=exact) for exact in (False, True))
    first = greedy_order(dense, as_tokens(ids_NT), 1)
    assert lazy.losses[0] == pytest.approx(first.losses[0])
    assert lazy.evaluations <= exact.evaluations
    evidence = measure_evidence(dense, as_tokens(ids_NT))
    assert set(influence_order(evidence)[:2]) == {1, 3}


def test_greedy_leaves_the_model_as_it_was(dense: LlamaForCausalLM, ids_NT: Tensor) -> None:
    before = dense(ids_NT, use_cache=False).logits
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    greedy_order(dense, as_tokens(ids_NT), 2)
    assert all("forward" not in vars(block) for block in dense.model.layers)
    assert torch.equal(dense(ids_NT, use_cache=False).logits, before)
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_a_failing_run_gives_the_forwards_back(dense: LlamaForCausalLM, ids_NT: Tensor) -> None:
    def fail(*_: object) -> Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), BlockRun(dense.model.layers, fail):
        last_hidden(dense, ids_NT)
    assert all("forward" not in vars(block) for block in dense.model.layers)


def test_a_forward_that_somebody_else_had_wrapped_comes_back(dense: LlamaForCausalLM) -> None:
    def wrapped(hidden_BTD: Tensor, **_: object) -> Tensor:
        return hidden_BTD

    dense.model.layers[1].forward = wrapped
    with BlockRun(dense.model.layers, lambda i, hidden_BTD, block: block(hidden_BTD)):
        pass
    assert dense.model.layers[1].forward is wrapped


def test_losses_in_pieces_equal_the_models_own(
    dense: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldsearch.model.head.JUDGED_AT_ONCE", 7)
    ids_NT = torch.randint(0, 61, (2, 20))
    loss_NP = next_token_losses(dense, last_hidden(dense, ids_NT), ids_NT)
    assert loss_NP.shape == (2, 19)
    for loss_P, ids_T in zip(loss_NP, ids_NT, strict=True):
        assert float(loss_P.mean()) == pytest.approx(without(dense, [], ids_T[None]), abs=1e-5)


def test_projection_equals_the_logits_of_a_soft_capped_model() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        final_logit_softcapping=0.5,
    )
    dense = Gemma2ForCausalLM(config).eval()
    ids_NT = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        expected = dense(ids_NT, use_cache=False).logits
        assert torch.allclose(head_logits(dense, last_hidden(dense, ids_NT)), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1)])
def test_too_little_text_is_refused(dense: LlamaForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(sequences, positions\)"):
        greedy_order(dense, as_tokens(torch.zeros(shape, dtype=torch.long)), 1)


@pytest.mark.parametrize("count", [0, NUM_BLOCKS])
def test_greedy_keeps_at_least_one_block(dense: LlamaForCausalLM, ids_NT: Tensor, count: int) -> None:
    with pytest.raises(InputError, match="From 1 to 4 blocks"):
        greedy_order(dense, as_tokens(ids_NT), count)
