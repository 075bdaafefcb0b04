"""Packed rows: examples do not see each other, their loss is that of the examples alone; else the model is refused."""

import pytest
import torch
import transformers as T

from hift_ds.recipes.datasets import TextData, TokenRows
from hift_ds.recipes.packing import check_apart, pack_cut, pack_whole

SIZES = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
LENGTHS = (9, 5, 12, 3)


def examples():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 97, (length,), generator=generator, dtype=torch.int32) for length in LENGTHS]
    return [(part, part.clone()) for part in ids]


def model_of(attention="sdpa"):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, attn_implementation=attention)).eval()


def loss_and_gradient(model, rows):
    data = TextData("rows", "chat", TokenRows(rows), TokenRows([]), 0)
    batch = data.collate([data.train[index] for index in range(len(rows))])
    counted = (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    loss = model(**batch, use_cache=False, num_items_in_batch=counted).loss
    loss.backward()
    return loss.item(), int(counted), torch.cat([param.grad.flatten() for param in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pack", [pack_whole, pack_cut])
def test_loss_and_gradient_of_packed_examples_are_those_of_the_examples_alone(attention, pack):
    model, rows = model_of(attention), pack(examples(), 29)
    assert len(rows) == 1
    packed, alone = loss_and_gradient(model, rows), loss_and_gradient(model, examples())
    assert packed[1] == alone[1] == sum(LENGTHS) - len(LENGTHS)
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert (packed[2] - alone[2]).abs().max() < 1e-6


def test_rows_of_whole_examples_are_padded_without_a_loss():
    model, rows = model_of(), pack_whole(examples(), 16)
    assert [len(ids) for ids, *_ in rows] == [14, 15]
    packed, alone = loss_and_gradient(model, rows), loss_and_gradient(model, examples())
    assert packed[0] == pytest.approx(alone[0], rel=1e-6) and packed[1] == alone[1]


def test_what_a_cut_leaves_begins_at_position_0_again():
    positions = [row[2].tolist() for row in pack_cut(examples(), 8)]
    assert positions == [[*range(8)], [0, *range(5), 0, 1], [*range(8)], [0, 1, 0, 1, 2]]
    assert max(map(max, positions)) < 32, "within the model's positions, however long a document"


class Leaky(T.LlamaForCausalLM):
    """Leaves the positions out, as a recurrent model does."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class Engine:
    device = "cpu"

    def __init__(self, module):
        self.module = module

    def __call__(self, **batch):
        return self.module(**batch)


def test_a_model_whose_examples_see_each_other_is_refused_by_name():
    for attention in ("sdpa", "eager"):
        check_apart(Engine(model_of(attention).train()), 97)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"^--pack: with attn_implementation 'sdpa' .* in Leaky; leave --pack out"):
        check_apart(Engine(Leaky(T.LlamaConfig(**SIZES))), 97)
