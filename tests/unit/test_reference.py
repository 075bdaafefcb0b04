"""The oracle of the tests on ranks is held against torch.optim and hand-made sums."""

import math

import pytest
import torch
from hift_testing.reference import LionByHand, ReferenceHiFT

HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
BLOCKS = [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]

WHOLE = [[name for block in BLOCKS for name in block]]


class Net(torch.nn.Sequential):
    """Three linear layers with a loss, called like a Hugging Face model."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(*(torch.nn.Linear(6, 6) if i % 2 == 0 else torch.nn.Tanh() for i in range(5)))

    def forward(self, x, y):
        output = super().forward(x)
        loss = torch.nn.functional.mse_loss(output.float(), y)
        return type("Output", (), {"loss": loss})()


def data(step, micro=0, rank=0):
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    x, y = torch.randn(2, 4, 6, generator=generator)
    return {"x": x, "y": y}


def adamw(members):
    return torch.optim.AdamW([tensor for _, tensor in members], foreach=False, **HYPER)


def reference(model, blocks, order=None, **kwargs):
    make = kwargs.pop("make_optimizer", adamw)
    rate = kwargs.pop("rate", lambda step: HYPER["lr"])
    return ReferenceHiFT(model, blocks, list(range(len(blocks))) if order is None else order, make, rate, **kwargs)


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_one_block_and_one_rank_is_torch_adamw(clip):
    plain, model = Net(), Net()
    optimizer = torch.optim.AdamW(plain.parameters(), foreach=False, **HYPER)
    oracle = reference(model, WHOLE, clip=clip)
    for step in range(6):
        optimizer.zero_grad()
        plain(**data(step)).loss.backward()
        if clip:
            # The oracle's own formula, as DeepSpeed has it: torch's clip_grad_norm_ adds 1e-6 elsewhere.
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in plain.parameters()))
            for param in plain.parameters():
                param.grad *= 1.0 / max(1.0, (norm + 1e-6) / clip)
        optimizer.step()
        oracle.step([[data(step)]])
    left, right = weights(plain), weights(model)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(not torch.equal(left[name], value) for name, value in weights(Net()).items())


def test_clipping_bounds_the_norm_as_torch_does():
    model, plain = Net(), Net()
    oracle = reference(model, WHOLE, clip=0.3)
    oracle.step([[data(0)]])
    plain(**data(0)).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
    assert oracle.norms == [pytest.approx(norm.item(), rel=1e-6)]
    assert norm > 0.3
    for name, param in plain.named_parameters():
        torch.testing.assert_close(oracle.masters[name].grad, param.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_only_the_active_block_moves(order):
    model = Net()
    oracle = reference(model, BLOCKS, order)
    for step in range(7):
        before = weights(model)
        oracle.step([[data(step)]])
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert moved == set(BLOCKS[order[step % 3]])


def test_a_block_s_turn_lasts_steps_per_block():
    model = Net()
    oracle = reference(model, BLOCKS, steps_per_block=2)
    active = []
    for step in range(6):
        before = weights(model)
        oracle.step([[data(step)]])
        active.append(BLOCKS.index([name for name in before if not torch.equal(before[name], weights(model)[name])]))
    assert active == [0, 0, 1, 1, 2, 2]


def test_always_names_train_at_every_step():
    model = Net()
    oracle = reference(model, [BLOCKS[0], BLOCKS[1]], always=BLOCKS[2])
    for step in range(4):
        before = weights(model)
        oracle.step([[data(step)]])
        moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
        assert moved == {*BLOCKS[step % 2], *BLOCKS[2]}


def test_each_block_counts_its_own_updates_and_keeps_its_state():
    oracle = reference(Net(), BLOCKS)
    for step in range(7):
        oracle.step([[data(step)]])
    steps = [next(iter(optimizer.state.values()))["step"].item() for optimizer in oracle.optimizers[:3]]
    assert steps == [3, 2, 2]


def test_reset_forgets_a_block_s_state_at_its_turn():
    oracle = reference(Net(), BLOCKS, reset=True, steps_per_block=2)
    for step in range(9):
        oracle.step([[data(step)]])
    steps = [next(iter(optimizer.state.values()))["step"].item() for optimizer in oracle.optimizers[:3]]
    assert steps == [2, 1, 2], "block 1 has had the first of its two steps"


def test_ranks_and_micro_steps_are_averaged_like_one_batch():
    """Four equal parts of a batch, two micro steps on two ranks, give the gradient of the whole batch."""
    whole, parts = Net(), Net()
    batch = data(0)
    reference(whole, WHOLE).step([[batch]])
    part = [{key: value[index : index + 1] for key, value in batch.items()} for index in range(4)]
    for early in (False, True):
        parts = Net()
        reference(parts, WHOLE, accumulate_before_reducing=early).step([part[:2], part[2:]])
        for name, value in weights(whole).items():
            torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)


def gradients_of(micro_steps, **kwargs):
    """The averaged gradient of a single bf16 parameter whose gradients on each rank and micro step are given."""

    class Dot(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))

        def forward(self, factor):
            return type("Output", (), {"loss": (self.w * factor).sum()})()

    oracle = reference(Dot(), [["w"]], **kwargs)
    scale = len(micro_steps[0])  # the loss is divided by the number of micro steps
    oracle.step([[{"factor": torch.tensor([g * scale]).bfloat16()} for g in rank] for rank in micro_steps])
    return oracle.masters["w"].grad.item()


SMALL = 2.0**-9  # lost beside 1 in bf16, which has 8 significant bits


def test_gradients_are_rounded_where_the_wire_rounds_them():
    assert gradients_of([[1.0], [SMALL]]) == 0.5
    assert gradients_of([[1.0], [SMALL]], communication_dtype=torch.float32, accumulation_dtype=torch.float32) == (
        (1.0 + SMALL) / 2
    )
    assert gradients_of([[1.0], [2.0]], mean=False) == 3.0
    assert gradients_of([[1.0], [2.0]], predivide=2.0) == 1.5
    # A third is not exact in bf16: dividing before and after the sum leaves its trace.
    third = torch.tensor(1.0).bfloat16() * (1 / 3.0)
    assert gradients_of([[1.0], [1.0]], predivide=3.0) == ((third + third) * 1.5).item()


def test_micro_steps_accumulate_in_the_dtype_asked_for():
    for early in (False, True):
        assert gradients_of([[1.0, SMALL]], accumulate_before_reducing=early) == 1.0 + SMALL
        lossy = {"accumulate_before_reducing": early, "accumulation_dtype": torch.bfloat16}
        assert gradients_of([[1.0, SMALL]], **lossy) == 1.0


def test_summing_before_or_after_the_wire_is_not_the_same():
    """The first rank's two micro steps fit into bf16 one by one, their sum does not."""
    micro_steps = [[1.0, SMALL], [0.0, 0.0]]
    assert gradients_of(micro_steps, accumulate_before_reducing=True) == 0.5
    assert gradients_of(micro_steps, accumulate_before_reducing=False) == 0.5 + SMALL / 2


def test_a_parameter_that_the_batch_does_not_reach_has_gradient_zero():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return type("Output", (), {"loss": (self.used * x).sum()})()

    model = Two()
    oracle = reference(model, [["unused"], ["used"]])
    oracle.step([[{"x": torch.ones(2)}]])
    assert oracle.norms == [0.0]
    assert torch.equal(model.unused.detach(), torch.ones(2) * (1 - 1e-2 * 0.1)), "decay acts all the same"
    assert torch.equal(model.used.detach(), torch.ones(2))


def test_each_group_keeps_its_rate_without_a_rate_function():
    def two_groups(members):
        by_name = dict(members)
        return torch.optim.SGD(
            [{"params": [by_name["0.weight"]], "lr": 0.5}, {"params": [by_name["0.bias"]], "lr": 0.25}], foreach=False
        )

    model = Net()
    before = weights(model)
    oracle = reference(model, [BLOCKS[0]], make_optimizer=two_groups, rate=None)
    oracle.step([[data(0)]])
    for name, rate in (("0.weight", 0.5), ("0.bias", 0.25)):
        assert torch.equal(weights(model)[name], before[name] - rate * oracle.masters[name].grad)


def test_bf16_weights_are_the_rounded_fp32_masters():
    model = Net().bfloat16()
    oracle = reference(model, BLOCKS)
    for step in range(6):
        oracle.step([[{"x": data(step)["x"].bfloat16(), "y": data(step)["y"]}]])
    for name, param in model.named_parameters():
        assert oracle.masters[name].dtype == torch.float32
        assert torch.equal(param.detach(), oracle.masters[name].bfloat16())
    differs = [name for name, m in oracle.masters.items() if not torch.equal(m, m.bfloat16().float())]
    assert len(differs) == 6, "masters hold more than the weights"


def test_lion_by_hand_takes_the_steps_of_the_paper():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = LionByHand([param], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    param.grad = torch.tensor([3.0, -1.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([0.98 - 0.1, -1.96 + 0.1, 0.49]))
    param.grad = torch.tensor([-20.0, 0.0, 1.0])
    optimizer.step()  # momentum 1.5, -0.5, 0: the sign is -, -, +
    torch.testing.assert_close(param.detach(), torch.tensor([0.88 * 0.98 + 0.1, -1.86 * 0.98 + 0.1, 0.49 * 0.98 - 0.1]))
