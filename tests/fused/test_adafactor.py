"""Adafactor's passes: each against numpy or float64, and whole trainings against the eager rule."""

import itertools
import math

import numpy as np
import pytest
import torch
from hift_kernels import adafactor_squares, grad_norm, launching
from hift_kernels.adafactor import adafactor_step, add_squares, add_update_square, add_weight_square, coefficients
from hift_kernels.grad_norm import FOUND_INF
from hift_kernels.launching import NUM_SCALARS, Weights
from hift_kernels.rounding import mixed_seed
from hift_testing import fused_oracle
from hift_testing.fused_cases import DEVICE, DTYPES, Guarded, Shard, as_numpy, awkward_gradient, gradient

from hift_ds.rules.adafactor import Adafactor
from hift_ds.shards import Segment

EPS1 = 2.0**-23
GROUP = {"weight_decay": 0.1, "beta2_decay": -0.8, "eps": (EPS1, 1e-3), "d": 1.0}
# Empty, scalar, vectors, matrices tall, wide, odd and larger than a block of a GPU, batches of matrices.
SHAPES = (
    (), (0,), (1,), (15,), (16,), (17,), (4097,), (0, 5), (5, 0), (1, 1), (1, 17), (16, 1), (17, 31), (64, 16),
    (300, 530), (3, 5, 7), (2, 16, 32), (5, 2, 3, 3), (2, 70, 300),
)  # fmt: skip


class Parameter:
    """A parameter, its moments and its place in the vectors that hold one element per parameter."""

    def __init__(self, shape: tuple[int, ...], index: int, form: str = "fp32", weight_dtype: str = "bf16") -> None:
        self.shape, self.index, self.numel = shape, index, math.prod(shape)
        start = torch.randn(self.numel, generator=torch.Generator().manual_seed(index))
        self.shard = Shard(form, self.numel, (), weight_dtype=weight_dtype, start=start)
        self.stored = self.new_sums()

    @property
    def matrices(self) -> tuple[int, int, int]:
        return (math.prod(self.shape[:-2]), *self.shape[-2:])

    def new_sums(self) -> list[Guarded]:
        if len(self.shape) < 2:
            return [Guarded(torch.zeros(self.numel))]
        batches, rows, columns = self.matrices
        return [Guarded(torch.zeros(batches * rows)), Guarded(torch.zeros(batches * columns))]

    def moments(self) -> tuple[torch.Tensor, ...]:
        return tuple(guarded.tensor for guarded in self.stored)

    def row_mean(self) -> torch.Tensor | None:
        if len(self.shape) < 2:
            return None
        return self.stored[0].tensor.view(self.matrices[:2]).mean(dim=1).clamp(min=EPS1)

    def weights(self, start: int, stop: int) -> Weights:
        whole = self.shard.weights
        master = None if whole.master is None else whole.master[start:stop]
        return Weights(whole.form, whole.weight[start:stop], master)


def cut(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """Slices that start and end mid-row; the first may be empty."""
    bounds = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def scalars_of(square: float, step: int, lr: float, divisor: float = 1.0) -> torch.Tensor:
    values = fused_oracle.scalars(square, divisor, step - 1, lr=lr, weight_decay=GROUP["weight_decay"])
    vector = torch.zeros(NUM_SCALARS)
    vector[: len(values)] = torch.tensor(list(values.values()), dtype=torch.float64).float()
    return vector.to(DEVICE)


def fused_step(
    params: list[Parameter], grads: list[torch.Tensor], lr: float, step: int, *, divisor=1.0, ranks=1, tiles=1
) -> None:
    """One update, as an engine makes it. The ranks take turns; what they would all-reduce they add up in one tensor."""
    scalars = scalars_of(sum(g.double().square().sum().item() for g in grads), step, lr, divisor)
    grads = [grad.to(DEVICE) for grad in grads]
    weight = step ** GROUP["beta2_decay"] * (1.0 - scalars[FOUND_INF])
    squares = torch.zeros(2, len(params), dtype=torch.float64, device=DEVICE)
    slices = [[cut(*part, tiles) for part in cut(0, param.numel, ranks)] for param in params]
    for param, grad, parts in zip(params, grads, slices, strict=True):
        sums = param.new_sums()
        for part in parts:
            start, stop = part[0][0], part[-1][1]
            totals = tuple(guarded.tensor for guarded in sums)
            add_squares(grad[start:stop], param.shape, start, scalars, totals)
            for tile in part:
                add_weight_square(param.weights(*tile), squares[0], param.index)
        divisors = param.shape[:-3:-1] if len(param.shape) > 1 else (1,)
        for stored, total, count in zip(param.stored, sums, divisors, strict=True):
            assert total.is_whole()
            stored.tensor.lerp_(total.tensor / max(count, 1), weight)
        for start, stop in itertools.chain(*parts):
            add_update_square(grad[start:stop], param.shape, start, scalars, param.moments(), param.row_mean(),
                              squares[1], param.index, eps1=EPS1)  # fmt: skip
    numels = torch.tensor([param.numel for param in params], device=DEVICE)
    coefficient = coefficients(*squares, numels, lr, step, eps2=GROUP["eps"][1], threshold=GROUP["d"])
    for param, grad, parts in zip(params, grads, slices, strict=True):
        seed = mixed_seed(step, param.index)
        for start, stop in itertools.chain(*parts):
            adafactor_step(grad[start:stop], param.weights(start, stop), param.shape, start, scalars, param.moments(),
                           param.row_mean(), coefficient, param.index, eps1=EPS1, seed=seed)  # fmt: skip
        assert all(guarded.is_whole() for guarded in param.shard._all())


class Eager:
    """The eager rule on the same parameters, whole, in one of torch's dtypes."""

    def __init__(self, params: list[Parameter], dtype: torch.dtype) -> None:
        self.rule, self.dtype, self.segments = Adafactor(), dtype, []
        offset = 0
        for param in params:
            shape = torch.Size(param.shape)
            self.segments.append(Segment(str(param.index), shape, 0, param.numel, offset, param.numel))
            offset += param.numel
        self.master = torch.cat([param.shard.start for param in params]).to(dtype)
        extra = self.rule.init_extra(self.segments, GROUP)
        self.extra = {name: tensor.to(dtype) for name, tensor in extra.items()}

    def step(self, grads: list[torch.Tensor], lr: float, step: int, divisor: float = 1.0) -> None:
        grad = torch.cat([grad.to(self.dtype) for grad in grads]) / divisor
        self.rule.update_run(
            lambda write: iter([(0, self.master)]), grad, GROUP, lr=lr, step=step, segments=self.segments,
            extra=self.extra, all_reduce=lambda tensor: None,
        )  # fmt: skip

    def of(self, param: Parameter) -> torch.Tensor:
        segment = self.segments[param.index]
        return self.master[segment.offset : segment.offset + segment.numel].double()

    def moments_of(self, param: Parameter) -> list[torch.Tensor]:
        slots = ("row_var", "col_var") if len(param.shape) > 1 else ("variance",)
        return [self.extra[f"{param.index}.{slot}"].flatten().double() for slot in slots]


def far(found: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> float:
    """Norm of the error over the norm of `scale`."""
    return ((found.double().cpu() - exact).norm() / scale.norm().clamp(min=1e-30)).item()


def train(
    shapes: tuple[tuple[int, ...], ...], num_steps: int, dtype: str = "fp32", divisor: float = 1.0, **options: int
) -> tuple[list[Parameter], Eager, Eager]:
    params = [Parameter(shape, index) for index, shape in enumerate(shapes)]
    eagers = Eager(params, torch.float32), Eager(params, torch.float64)
    for step in range(1, num_steps + 1):
        grads = [gradient(param.numel, 100 * param.index + step, dtype) for param in params]
        fused_step(params, grads, 0.02, step, divisor=divisor, **options)
        for eager in eagers:
            eager.step(grads, 0.02, step, divisor)
    return params, *eagers


def assert_near_float64(params: list[Parameter], fp32: Eager, exact: Eager) -> None:
    """As near as the eager rule in fp32, whose rounding is the same but for the order of summation.

    Movements: measured at most 1.0 of its error, 3e-6 to 8e-6. Moments: 1e-7, a root of a sum is 2 spacings off.
    """
    for param in params:
        if param.numel:
            moved = exact.of(param) - param.shard.start.double()
            theirs = far(fp32.of(param), exact.of(param), moved)
            assert moved.norm() > 0 and theirs < 2e-5
            assert far(param.shard.master_fp32(), exact.of(param), moved) < 1.5 * theirs, param.shape
            for found, moment in zip(param.moments(), exact.moments_of(param), strict=True):
                assert far(found, moment, moment) < 4e-7, param.shape


@pytest.mark.parametrize(
    ("shapes", "ranks", "tiles", "dtype"),
    [(SHAPES, 1, 1, "bf16"), (((17,), (17, 31), (3, 5, 7), (1,)), 3, 1, "fp16"), (((50,), (5, 2, 3, 3)), 2, 3, "fp32")],
    ids=["every_shape", "ranks", "ranks_and_tiles"],
)
def test_updates_follow_the_eager_rule_however_a_parameter_is_cut(shapes, ranks, tiles, dtype):
    assert_near_float64(*train(shapes, 2, dtype, divisor=4.0, ranks=ranks, tiles=tiles))


@pytest.mark.parametrize(
    ("shapes", "num_steps"),
    [
        (((3, 17, 21),), 20),
        pytest.param(((33,), (17, 31), (3, 17, 21), (1, 65)), 100, marks=pytest.mark.slow),
    ],
    ids=["one", "several"],
)
def test_many_steps_on_two_ranks_are_as_near_to_float64_as_the_eager_rule(shapes, num_steps):
    assert_near_float64(*train(shapes, num_steps, ranks=2))


@pytest.fixture
def small_blocks(monkeypatch):
    """Programs as on a GPU: many, of several blocks each. The interpreter's own are as large as these parameters."""
    for module, constants in (
        (adafactor_squares, {"_BLOCK": 128, "_COLUMNS": 16, "_BLOCKS": 4, "_PROGRAMS": 2, "_PARTIALS": 2}),
        (grad_norm, {"_TILE": 64, "MAX_PROGRAMS": 4}),
        (launching, {"TILE": 64}),
    ):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", [(53, 50), (2, 40, 21), (9, 3, 5), (700, 1), (1, 300), (400,)])
def test_many_programs_of_several_blocks_do_what_one_does(shape):
    param = Parameter(shape, 0)
    grad, start = gradient(param.numel, 1), param.numel // 3 - 1
    scalars, whole = scalars_of(1.0, 1, 0.1, divisor=0.5), torch.zeros(param.numel, dtype=torch.float64)
    whole[start:-5] = (grad.double() * 2)[start:-5]
    exact = whole.view(shape).square()
    sums = [exact] if len(shape) < 2 else [exact.sum(dim=-1), exact.sum(dim=-2)]
    add_squares(grad[start:-5].to(DEVICE), shape, start, scalars, param.moments())
    for found, expected in zip(param.stored, sums, strict=True):
        assert found.is_whole()
        # 3 spacings of what 50 squares of fp32 add up to; 0 where the slice touches nothing.
        assert torch.allclose(found.tensor.cpu().double(), expected.flatten(), rtol=4e-7, atol=0)
        found.tensor.clamp_(min=1e-3)
    result = torch.full((3,), 5.0, dtype=torch.float64, device=DEVICE)
    tile = slice(start, -5)
    add_weight_square(param.weights(start, param.numel - 5), result, 1)
    add_update_square(grad[tile].to(DEVICE), shape, start, scalars, param.moments(), param.row_mean(), result, 2,
                      eps1=1e-3)  # fmt: skip
    update = whole.numpy() / np.sqrt(np.maximum(estimate_of(param, np.float64), 1e-6))
    weight_square = param.shard.start[tile].double().square().sum().item()
    expected = torch.tensor([5.0, 5.0 + weight_square, 5.0 + np.square(update).sum()], dtype=torch.float64)
    assert torch.allclose(result.cpu(), expected, rtol=1e-6, atol=0)


def estimate_of(param: Parameter, dtype: type) -> np.ndarray:
    """Each element's second moment, by numpy."""
    moments = [as_numpy(moment).astype(dtype) for moment in param.moments()]
    if len(param.shape) < 2:
        return moments[0]
    batches, rows, columns = param.matrices
    row_var, col_var = moments[0].reshape(batches, rows, 1), moments[1].reshape(batches, 1, columns)
    return (row_var * col_var / as_numpy(param.row_mean()).astype(dtype).reshape(-1, 1, 1)).ravel()


def filled(shape: tuple[int, ...], form: str = "fp32", weight_dtype: str = "bf16") -> Parameter:
    """A parameter whose moments spread over 12 decades, some below eps1 squared."""
    param = Parameter(shape, 3, form, weight_dtype)
    for index, stored in enumerate(param.stored):
        stored.tensor.copy_(gradient(stored.tensor.numel(), index, decades=9.0).square() + 1e-12)
    return param


def step_of(
    param: Parameter, grad: torch.Tensor, scalars: torch.Tensor, coefficient: float, parts: int = 1, seed: int = 0
) -> None:
    vector = torch.tensor([1e9, coefficient], device=DEVICE)
    for start, stop in cut(0, param.numel, parts):
        adafactor_step(grad[start:stop].to(DEVICE), param.weights(start, stop), param.shape, start, scalars,
                       param.moments(), param.row_mean(), vector, 1, eps1=EPS1, seed=seed)  # fmt: skip


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize(
    ("form", "weight_dtype"),
    [("plain", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"), ("split16", "bf16")],
)
def test_a_step_s_bits_equal_numpy_fp32(form, weight_dtype, grad_dtype):
    for shape in ((3, 11, 31), (17, 31), (100,)):
        param, grad = filled(shape, form, weight_dtype), gradient(math.prod(shape), 1, grad_dtype)
        master, scalars = as_numpy(param.shard.start), scalars_of(1.0, 1, 0.05, divisor=2.0)
        step_of(param, grad, scalars, 1.7e-3)
        fused_oracle.adafactor(master, as_numpy(grad), as_numpy(scalars), estimate_of(param, np.float32),
                               np.float32(1.7e-3), eps1=EPS1)  # fmt: skip
        assert np.array_equal(param.shard.master_fp32().numpy().view(np.int32), master.view(np.int32))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["fp32", "none"])
@pytest.mark.parametrize("shape", [(3, 11, 31), (400,)])
def test_tiles_of_any_length_give_the_bits_of_one_pass(form, shape):
    whole, tiled = filled(shape, form), filled(shape, form)
    for step in range(2):
        for param, parts in ((whole, 1), (tiled, 3)):
            step_of(param, gradient(param.numel, step), scalars_of(1.0, 1, 0.05), 1e-2, parts, mixed_seed(5, step))
    assert all(torch.equal(a, b) for a, b in zip(whole.shard.snapshot(), tiled.shard.snapshot(), strict=True))
    assert (whole.shard.master_fp32() != whole.shard.start).float().mean() > 0.1


def test_masters_without_fp32_move_without_bias():
    """20 steps of a vector; a spacing near 1 is 2^-8 to 2^-7, stochastic rounding is off by 0.4 of it a step."""
    param = Parameter((2048,), 0, "none")
    param.stored[0].tensor.fill_(1.0)
    exact = param.shard.start.double()
    for step in range(20):
        grad = gradient(2048, step, decades=1.0)
        step_of(param, grad, scalars_of(1.0, 1, 0.0), 1e-2, seed=mixed_seed(1, step))
        exact -= 1e-2 * grad.double()
    error, moved = param.shard.master_fp32().double() - exact, exact - param.shard.start.double()
    assert error.norm() < moved.norm()
    assert error.mean().abs() < 4 * error.std() / 2048**0.5


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_leaves_every_bit(bad):
    params = [Parameter(shape, index, form) for index, (shape, form) in enumerate(
        [((17, 31), "fp32"), ((3, 5, 7), "split16"), ((40,), "none"), ((15,), "plain")]
    )]  # fmt: skip

    def snapshot() -> list[torch.Tensor]:
        kept = [(*param.shard.snapshot(), *(stored.whole.clone() for stored in param.stored)) for param in params]
        return list(itertools.chain(*kept))

    fused_step(params, [gradient(param.numel, 1) for param in params], 0.02, 1)
    before, grads = snapshot(), [gradient(param.numel, 2) for param in params]
    for grad in grads:
        grad[grad.numel() // 2] = bad
    fused_step(params, grads, 0.02, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    result, matrix = fp64_vector(3.0), params[0]
    add_update_square(grads[0].to(DEVICE), matrix.shape, 0, scalars_of(bad, 2, 0.02), matrix.moments(),
                      matrix.row_mean(), result, 0, eps1=EPS1)  # fmt: skip
    assert result.item() == 3.0


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])  # the interpreter widens bf16 denormals wrongly
def test_zeros_and_denormals_and_a_gradient_of_nothing_but_zeros(dtype):
    params = [Parameter(shape, index) for index, shape in enumerate([(5, 10), (50,), (3, 7), (9,)])]
    fp32 = Eager(params, torch.float32)
    for step in (1, 2):
        grads = [awkward_gradient(dtype), awkward_gradient(dtype), torch.zeros(21), torch.zeros(9)]
        fused_step(params, grads, 0.02, step)
        fp32.step(grads, 0.02, step)
    for param in params:
        # An update is at most 0.02 times the weights' root mean square; an eager step is a fused multiply-add.
        assert torch.allclose(param.shard.master_fp32().double(), fp32.of(param), rtol=0, atol=1e-6)
    decayed = params[3].shard.start * 0.998**2
    assert torch.allclose(params[3].shard.master_fp32(), decayed, rtol=1e-6)


def test_coefficients_by_hand():
    """Weights of 2, 0.1 (below eps2 = 0.5) and 3, updates of 4 (clipped at 2), 1 and 8; 1 / sqrt(400) below lr."""
    numels = torch.tensor([4, 100, 1, 0], device=DEVICE)
    params, updates = fp64_vector(16.0, 1.0, 9.0, 0.0), fp64_vector(64.0, 100.0, 64.0, 0.0)
    found = coefficients(params, updates, numels, 0.1, 400, eps2=0.5, threshold=2.0)
    expected = torch.tensor([2 * 0.05 / 2, 0.5 * 0.05, 3 * 0.05 / 4, 0.5 * 0.05])
    assert found.dtype == torch.float32 and torch.allclose(found.cpu(), expected, rtol=1e-7)
    assert coefficients(params, updates, numels, 0.01, 400, eps2=0.5, threshold=2.0)[1] == np.float32(0.5 * 0.01)


def fp64_vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


def test_what_does_not_fit_is_refused():
    param, scalars, grad = Parameter((4, 8), 0), scalars_of(1.0, 1, 0.1), torch.zeros(16, device=DEVICE)
    moments, mean, result = param.moments(), param.row_mean(), fp64_vector(0.0)
    with pytest.raises(ValueError, match=r"start=17: 16 elements must lie in a parameter of shape \(4, 8\)"):
        add_squares(grad, (4, 8), 17, scalars, moments)
    with pytest.raises(ValueError, match=r"moments: 2 tensors; shape \(32,\) needs variance"):
        add_squares(grad, (32,), 0, scalars, moments)
    with pytest.raises(ValueError, match=r"col_var\.shape=\(4,\): must be contiguous, 1-D, of 8 elements"):
        add_squares(grad, (4, 8), 0, scalars, (moments[0], moments[0]))
    with pytest.raises(ValueError, match=r"row_mean: must be a tensor for shape \(4, 8\)"):
        add_update_square(grad, (4, 8), 0, scalars, moments, None, result, 0, eps1=EPS1)
    with pytest.raises(ValueError, match=r"index=1: must be from 0 to 0, the last of result"):
        add_update_square(grad, (4, 8), 0, scalars, moments, mean, result, 1, eps1=EPS1)
    with pytest.raises(ValueError, match=r"result\.dtype=torch\.float32: must be torch\.float64"):
        add_weight_square(param.weights(0, 16), result.float(), 0)
    with pytest.raises(ValueError, match=r"weight\.shape=\(15,\): must be contiguous, 1-D, of 16 elements"):
        adafactor_step(grad, param.weights(0, 15), (4, 8), 0, scalars, moments, mean, scalars, 0, eps1=EPS1)
    with pytest.raises(ValueError, match=r"coefficient\.dtype=torch\.float64: must be torch\.float32"):
        adafactor_step(grad, param.weights(0, 16), (4, 8), 0, scalars, moments, mean, result, 0, eps1=EPS1)
