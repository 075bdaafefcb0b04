"""Bytes that compiled parts of layers move, against sums by hand."""

import pytest
import torch
import torch._dynamo
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from hift_ds.memory.fusion import Record, moved_when_fused
from hift_ds.memory.planner import Planner
from hift_ds.memory.request import Request
from hift_ds.memory.work import micro_step_work

X, GATE, UP, SMALL, OUT, GRAD, LATER = range(7)
ALONE = 1000


def element_wise(reads, writes, part="mlp", visit=1):
    return Record(part, visit, None, ALONE, reads, writes)


def product(reads, writes, part="mlp", visit=1):
    return Record(part, visit, 1, 0, reads, writes)


def moved(*records, grads=()):
    return moved_when_fused(records, grads)


GATED = (
    product({X: 8}, {GATE: 20}), element_wise({GATE: 20}, {SMALL: 20}), product({X: 8}, {UP: 20}),
    element_wise({SMALL: 20, UP: 20}, {OUT: 20}),
)  # fmt: skip


def test_what_waits_for_the_same_products_is_one_kernel_whose_own_results_stay_in_it():
    assert moved(*GATED, product({OUT: 20}, {LATER: 8})) == [0, 20 + 20 + 20, 0, 0, 0]


def test_backward_makes_anew_what_forward_has_not_written():
    """As gate's gradient: of what reaches the part, and of what the gated activation came of."""
    backward = (
        product({GRAD: 8}, {7: 20}, visit=2), element_wise({7: 20, SMALL: 20}, {8: 20}, visit=2),
        product({8: 20}, {9: 8}, visit=2),
    )  # fmt: skip
    assert moved(*GATED, product({OUT: 20}, {LATER: 8}), *backward)[5:] == [0, 20 + 20 + 20, 0]


def test_what_another_part_reads_is_written_and_read():
    norm = element_wise({X: 8}, {1: 8}, "norm"), element_wise({1: 8}, {2: 8}, "norm")
    assert moved(*norm, element_wise({2: 8}, {3: 8}, "next", 2), product({3: 8}, {4: 8}, "next", 2)) == [16, 0, 16, 0]


def test_a_result_that_nobody_reads_takes_no_kernel():
    assert moved(element_wise({X: 8}, {1: 8})) == [0]


def test_a_gradient_is_summed_in_a_kernel_of_its_own():
    rows = element_wise({X: 8, GRAD: 8}, {1: 8}), element_wise({X: 8, GRAD: 8}, {2: 4})
    carried = product({1: 8}, {3: 8})
    assert moved(*rows, carried) == [16 + 8, 0, 0]
    assert moved(*rows, carried, grads=[2]) == [2 * 16 + 8 + 4, 0, 0]


def test_outside_of_parts_each_operation_moves_its_own():
    assert moved(element_wise({X: 8}, {1: 8}, None), element_wise({1: 8}, {2: 8}, None)) == [ALONE, ALONE]


SEQ, ROWS, WIDTH, INNER, HEADS = 16, 2, 64, 160, 4


def layer_of(checkpointing, compiled):
    """Bytes of one layer more, in forward and in backward, and the operations of both."""
    found = []
    for layers in (3, 2):
        config = LlamaConfig(
            vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
            num_attention_heads=HEADS, num_key_value_heads=HEADS // 2,
        )  # fmt: skip
        section = {
            "train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": 0.0, "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"}, "hift": {"enabled": True},
        }  # fmt: skip
        layout = Planner(config).layout(Request(section, SEQ, None, checkpointing))
        forward, until = micro_step_work(layout.model, layout.trained, ROWS, SEQ, compiled=compiled)
        backward = max(until.values(), key=lambda work: work.operations)
        found.append((forward.moved, backward.moved, forward.operations, backward.operations))
    return [one - other for one, other in zip(*found, strict=True)]


HIDDEN, GATED_BYTES, NORM = 2 * ROWS * SEQ * WIDTH, 2 * ROWS * SEQ * INNER, 2 * WIDTH
ANGLES = 2 * 2 * SEQ * WIDTH // HEADS
TURNED = 2 * (HIDDEN + HIDDEN // 2) + ANGLES  # queries and half as many keys, read and written
NORMS = 2 * (2 * HIDDEN + NORM)
FORWARD = NORMS + TURNED + 3 * GATED_BYTES + 2 * 3 * HIDDEN  # and two sums with what went past
BACKWARD = (
    5 * GATED_BYTES + 3 * HIDDEN  # gate and up; the sum of their inputs' gradients
    + TURNED + 4 * HIDDEN  # the same of queries, keys and values
    + 2 * (2 * (2 * HIDDEN + NORM) + HIDDEN + NORM + 3 * HIDDEN)  # norms, weights apart; what went past
)  # fmt: skip


def test_a_layer_s_kernels_add_up():
    forward, backward, *_ = layer_of(checkpointing=False, compiled=True)
    assert (forward, backward) == (FORWARD, BACKWARD)


def test_recomputation_is_another_forward_but_for_its_last_sum():
    again = layer_of(checkpointing=True, compiled=True)[1] - BACKWARD
    assert again == FORWARD - 3 * HIDDEN


def test_products_are_those_of_the_uncompiled_model_which_moves_three_times_the_bytes():
    for checkpointing in (False, True):
        plain, fused = (layer_of(checkpointing, compiled) for compiled in (False, True))
        assert plain[2:] == fused[2:]
        assert all(3 * one < other < 4.5 * one for one, other in zip(fused[:2], plain[:2], strict=True))


def kernels_of_torch(part, hidden):
    """Bytes that torch.compile says its own kernels move in forward and backward, without those of products."""
    from torch._inductor import config, metrics

    torch._dynamo.reset()
    torch._logging.set_logs(inductor_metrics=True)
    found = []
    try:
        with config.patch(force_disable_caches=True):
            out = torch.compile(part)(hidden)
            for _ in range(2):
                found.append(sum(
                    4 * count for node, count in metrics.nodes_num_elem if "Extern" not in type(node).__name__
                ))  # fmt: skip
                metrics.reset()
                if len(found) == 1:
                    out.sum().backward()
    finally:
        torch._logging.set_logs()
    return found


@pytest.mark.slow
def test_torch_s_own_kernels_move_as_much_in_norm_and_feed_forward():
    config = LlamaConfig(hidden_size=256, intermediate_size=896, hidden_act="silu")
    hidden = torch.randn(2, 128, 256, dtype=torch.bfloat16, requires_grad=True)
    inner = hidden.nbytes * 896 // 256
    norm = kernels_of_torch(LlamaRMSNorm(256).bfloat16(), hidden)
    assert norm == pytest.approx([2 * hidden.nbytes, 5 * hidden.nbytes], rel=0.02)
    gated = kernels_of_torch(LlamaMLP(config).bfloat16(), hidden)
    assert gated == pytest.approx([3 * inner, 5 * inner + 3 * hidden.nbytes], rel=0.02)
