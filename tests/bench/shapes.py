"""Published shapes of models, priced without their weights: `python tests/bench/shapes.py`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import transformers as tf

from foldsearch.model.measure import measure
from foldsearch.plan.cost import Target, price
from foldsearch.plan.plan import FoldPlan

CONTEXT = 4096
# The settings of each model's own config.json.
SHAPES = {
    "Qwen3-30B-A3B": tf.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, tie_word_embeddings=False,
    ),
    "LFM2-1.2B": tf.Lfm2Config(
        vocab_size=65536, hidden_size=2048, intermediate_size=12288, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, full_attn_idxs=[2, 5, 8, 10, 12, 14],
    ),
    "SmolLM3-3B": tf.SmolLM3Config(),
}  # fmt: skip


def main() -> None:
    """A row a model, dense and without its last block but one."""
    print(
        "| model | plan | parameters | MACs a token, attention's products aside | cache at 4,096 tokens, MB |"
    )
    print("|---|---|---|---|---|")
    for name, config in SHAPES.items():
        table = measure(config)
        num_blocks = len(table.blocks)
        for plan in (
            FoldPlan.identity(num_blocks),
            FoldPlan.dropping([num_blocks - 2], num_blocks),
        ):
            cost = price(plan, table, Target(context=CONTEXT))
            context_macs = sum(
                table.blocks[slot.home].attention.context_macs * CONTEXT for slot in plan.slots
            )
            print(
                f"| {name} | `{plan}` | {cost.weight_bytes // 2:,} | {cost.decode_macs - context_macs:,} | "
                f"{cost.kv_bytes / 1e6:.2f} |"
            )


if __name__ == "__main__":
    main()
