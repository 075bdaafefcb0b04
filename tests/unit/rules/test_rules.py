"""hift_ds.rules: bit-equal to torch.optim where elementwise; Adafactor on shards equal to Adafactor on parameters."""

import importlib
import threading

import pytest
import torch

from hift_ds.config.optimizers import check_form, rule_from_config, rule_from_optimizer
from hift_ds.shards import Segment

# Lengths with and without a whole number of vector registers, a scalar, an empty and a 3-D parameter.
SHAPES = {"weight": (37, 65), "bias": (33,), "scalar": (), "stack": (3, 5, 7), "empty": (0, 4), "wide": (2, 300)}
NUM_STEPS = 20


def _parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = {fqn: torch.randn(shape, generator=generator) for fqn, shape in shapes.items()}
    for fqn in ("bias", "flat"):  # as biases start: smaller than Adafactor's eps[1]
        if fqn in values:
            values[fqn].zero_()
    return values


def _gradients(step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + step)
    scale = (1.0, 1e-3, 30.0)[step % 3]
    return {fqn: torch.randn(shape, generator=generator) * scale for fqn, shape in shapes.items()}


def _rate(step):
    return 1e-2 / step


def _flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _run_torch(optimizer_class, hyper, shapes=SHAPES, num_steps=NUM_STEPS):
    parameters = {fqn: torch.nn.Parameter(value) for fqn, value in _parameters(shapes).items()}
    optimizer = optimizer_class(list(parameters.values()), foreach=False, **hyper)
    for step in range(1, num_steps + 1):
        for fqn, grad in _gradients(step, shapes).items():
            parameters[fqn].grad = grad
        optimizer.param_groups[0]["lr"] = _rate(step)
        optimizer.step()
    return {fqn: value.detach() for fqn, value in parameters.items()}, optimizer


def _new_state(rule, group, numel):
    return {slot: torch.full((numel,), rule.initial_value(slot, group)) for slot in rule.slots(group)}


def _run_rule(rule, group, num_steps=NUM_STEPS, tile=None):
    master = _flatten(_parameters())
    state = _new_state(rule, group, master.numel())
    for step in range(1, num_steps + 1):
        grad = _flatten(_gradients(step))
        for start in range(0, master.numel(), tile or master.numel()):
            piece = slice(start, start + (tile or master.numel()))
            tiles = {slot: tensor[piece] for slot, tensor in state.items()}
            rule.update(master[piece], grad[piece], tiles, group, lr=_rate(step), step=step)
    return master, state


ELEMENTWISE = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}),
    (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.0, 0.5)}),
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.3, "eps": 1e-6}),
    (torch.optim.Adam, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adagrad, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
]


@pytest.mark.parametrize(("optimizer_class", "hyper"), ELEMENTWISE)
def test_elementwise_rules_are_bit_equal_to_torch_optim(optimizer_class, hyper):
    expected, optimizer = _run_torch(optimizer_class, hyper)
    rule = rule_from_optimizer(optimizer)
    group = optimizer.param_groups[0]
    master, state = _run_rule(rule, group)

    assert rule.elementwise
    assert torch.equal(master, _flatten(expected))
    assert not torch.equal(master, _flatten(_parameters()))
    for slot, value in state.items():
        assert torch.equal(value, torch.cat([optimizer.state[p][slot].flatten() for p in group["params"]])), slot
    torch_slots = set().union(*(s.keys() for s in optimizer.state.values())) - {"step"}
    assert set(rule.slots(group)) == torch_slots


@pytest.mark.parametrize(("optimizer_class", "hyper"), ELEMENTWISE)
def test_tiles_give_the_same_bits_as_the_whole_shard(optimizer_class, hyper):
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **hyper)
    rule, group = rule_from_optimizer(optimizer), optimizer.param_groups[0]
    whole, whole_state = _run_rule(rule, group)
    tiled, tiled_state = _run_rule(rule, group, tile=101)
    assert torch.equal(whole, tiled)
    for slot, value in whole_state.items():
        assert torch.equal(value, tiled_state[slot]), slot


def test_adam_without_bias_correction_matches_a_hand_computed_step():
    rule, group = rule_from_config("AdamW", {"bias_correction": False, "betas": [0.9, 0.75], "eps": 1.0})
    master, state = torch.tensor([1.0]), {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    rule.update(master, torch.tensor([2.0]), state, group, lr=0.5, step=1)
    # exp_avg 0.1 * 2, exp_avg_sq 0.25 * 4: 1 - 0.5 * 0.2 / (1 + 1); with correction it would be 1 - 0.5 * 2 / (2 + 1)
    assert master.item() == pytest.approx(0.95)


def _lion_by_hand(lr_of, num_steps, beta1, beta2, weight_decay):
    """Lion, one element at a time in double precision."""
    values, momenta = _flatten(_parameters()).tolist(), [0.0] * _flatten(_parameters()).numel()
    for step in range(1, num_steps + 1):
        lr = lr_of(step)
        for index, grad in enumerate(_flatten(_gradients(step)).tolist()):
            mixed = beta1 * momenta[index] + (1 - beta1) * grad
            sign = (mixed > 0) - (mixed < 0)
            values[index] = values[index] * (1 - lr * weight_decay) - lr * sign
            momenta[index] = beta2 * momenta[index] + (1 - beta2) * grad
    return torch.tensor(values), torch.tensor(momenta)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_matches_a_loop_over_elements(weight_decay):
    rule, group = rule_from_config("Lion", {"betas": [0.9, 0.99], "weight_decay": weight_decay})
    master, state = _run_rule(rule, group)
    expected, momentum = _lion_by_hand(_rate, NUM_STEPS, 0.9, 0.99, weight_decay)
    # 20 roundings of 2^-24 relative each; a wrong sign would be 5e-4 or more.
    torch.testing.assert_close(master, expected, rtol=2e-6, atol=2e-6)
    # Gradients of 30 cancel: absolute roundings of 2^-24 (measured 6e-7 on an x86 CPU).
    torch.testing.assert_close(state["exp_avg"], momentum, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("optimizer_type", ["AdamW", "SGD", "Adagrad", "Lion"])
def test_padding_stays_zero(optimizer_type):
    params = {"weight_decay": 0.1, "lr": 0.1} | ({"momentum": 0.9} if optimizer_type == "SGD" else {})
    rule, group = rule_from_config(optimizer_type, params)
    master = torch.zeros(9)
    state = _new_state(rule, group, 9)
    for step in range(1, 4):
        rule.update(master, torch.zeros(9), state, group, lr=0.1, step=step)
    assert torch.equal(master, torch.zeros(9))


def test_the_rate_is_the_argument_and_not_the_groups():
    for optimizer_type in ("AdamW", "SGD", "Adagrad", "Lion"):
        rule, group = rule_from_config(optimizer_type, {"lr": 123.0})
        master = torch.ones(3)
        rule.update(master, torch.ones(3), _new_state(rule, group, 3), group, lr=0.0, step=1)
        assert torch.equal(master, torch.ones(3)), optimizer_type


# Adafactor sums squares in another order than torch's norms, and over ranks in a third. After ADAFACTOR_STEPS steps
# that move a parameter by up to 0.05, parameters of size 4 differ by one rounding (measured 2.4e-7 on an x86 CPU).
ADAFACTOR_TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
ADAFACTOR_STEPS = 10
ADAFACTOR_SHAPES = SHAPES | {"conv": (4, 3, 3, 3), "tall": (41, 1), "pair": (2,), "flat": (1, 19), "one": (1, 1)}
ADAFACTOR_HYPER = [{}, {"weight_decay": 0.1, "d": 1.5, "beta2_decay": -0.5}, {"eps": (1e-4, 1e-1)}]


class _LockStep:
    """all_reduce for ranks that are threads: sums in rank order, so that every rank gets the same bits."""

    def __init__(self, world):
        self.barrier = threading.Barrier(world, timeout=60)
        self.tensors = [None] * world
        self.num_calls = [0] * world

    def all_reduce(self, rank):
        def reduce(tensor):
            self.num_calls[rank] += 1
            self.tensors[rank] = tensor.clone()
            self.barrier.wait()
            tensor.copy_(sum(self.tensors[1:], self.tensors[0]))
            self.barrier.wait()

        return reduce


def _cuts(numel, world, even):
    """Bounds of the ranks' slices: equal ones as ZeRO cuts, or anywhere."""
    if even:
        size = -(-numel // world)
        return [min(numel, rank * size) for rank in range(world + 1)]
    generator = torch.Generator().manual_seed(numel)
    inner = torch.randint(0, numel + 1, (world - 1,), generator=generator).sort().values.tolist()
    return [0, *inner, numel]


def _segments(rank, world, even, shapes):
    segments, offset = [], 0
    for fqn, shape in shapes.items():
        shape = torch.Size(shape)
        cuts = _cuts(shape.numel(), world, even)
        start, stop = cuts[rank], cuts[rank + 1]
        padded = -(-shape.numel() // world) + 3 if even else stop - start
        segments.append(Segment(fqn, shape, start, stop - start, offset, padded))
        offset += padded
    return segments, offset


def _shard(tensors, segments, numel):
    flat = torch.zeros(numel)
    for segment in segments:
        piece = tensors[segment.fqn].flatten()[segment.start : segment.start + segment.numel]
        flat[segment.offset : segment.offset + segment.numel] = piece
    return flat


def whole(master):
    """A run in one tile."""
    return lambda write: iter([(0, master)])


def _run_rank(rule, group, rank, world, even, ranks, results):
    segments, numel = _segments(rank, world, even, ADAFACTOR_SHAPES)
    master = _shard(_parameters(ADAFACTOR_SHAPES), segments, numel)
    extra = rule.init_extra(segments, group)
    all_reduce = ranks.all_reduce(rank) if world > 1 else lambda tensor: None
    options = {"segments": segments, "extra": extra, "all_reduce": all_reduce}
    try:
        for step in range(1, ADAFACTOR_STEPS + 1):
            grad = _shard(_gradients(step, ADAFACTOR_SHAPES), segments, numel)
            rule.update_run(whole(master), grad, group, lr=_rate(step), step=step, **options)
    except BaseException:
        ranks.barrier.abort()
        raise
    results[rank] = (segments, master, extra)


def _run_adafactor(hyper, world, even=True):
    """Parameters put together from all ranks, each rank's extra, and the number of all-reduces a rank made."""
    rule, group = rule_from_config("Adafactor", hyper)
    ranks, results = _LockStep(world), [None] * world
    arguments = [(rule, group, rank, world, even, ranks, results) for rank in range(world)]
    threads = [threading.Thread(target=_run_rank, args=args, daemon=True) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert None not in results, "a rank failed"

    whole = {fqn: torch.full((torch.Size(shape).numel(),), torch.nan) for fqn, shape in ADAFACTOR_SHAPES.items()}
    for segments, master, _ in results:
        for segment in segments:
            end = segment.offset + segment.numel
            whole[segment.fqn][segment.start : segment.start + segment.numel] = master[segment.offset : end]
            assert not master[end : segment.offset + segment.padded_numel].any(), "padding moved"
    parameters = {fqn: value.view(ADAFACTOR_SHAPES[fqn]) for fqn, value in whole.items()}
    return parameters, [extra for _, _, extra in results], ranks.num_calls


def _assert_all_close(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, **ADAFACTOR_TOLERANCE, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("hyper", ADAFACTOR_HYPER)
def test_adafactor_on_one_rank_matches_torch_optim(hyper):
    # torch's Adafactor divides by zero on an empty parameter; ours is compared without it.
    shapes = {fqn: shape for fqn, shape in ADAFACTOR_SHAPES.items() if fqn != "empty"}
    expected, optimizer = _run_torch(torch.optim.Adafactor, hyper, shapes, ADAFACTOR_STEPS)
    parameters, (extra,), _ = _run_adafactor(hyper, world=1)
    assert parameters.pop("empty").shape == (0, 4)
    _assert_all_close(parameters, expected)
    for fqn, parameter in zip(shapes, optimizer.param_groups[0]["params"], strict=True):
        for slot in optimizer.state[parameter].keys() - {"step"}:
            torch.testing.assert_close(extra[f"{fqn}.{slot}"], optimizer.state[parameter][slot], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("hyper", ADAFACTOR_HYPER)
@pytest.mark.parametrize("even", [True, False], ids=["zero_slices", "slices_anywhere"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_adafactor_on_shards_matches_one_rank(world, even, hyper):
    expected, (whole_extra,), _ = _run_adafactor(hyper, world=1)
    parameters, extras, num_calls = _run_adafactor(hyper, world, even)
    _assert_all_close(parameters, expected)
    for extra in extras:
        for key, value in whole_extra.items():
            torch.testing.assert_close(extra[key], value, rtol=1e-5, atol=1e-9)
            assert torch.equal(extra[key], extras[0][key]), f"{key} differs between ranks"
    assert num_calls == [2 * ADAFACTOR_STEPS] * world


def test_adafactor_state_is_rows_and_columns_on_the_host():
    rule, group = rule_from_config("Adafactor", {})
    segments, _ = _segments(0, 2, True, {"matrix": (40, 30), "conv": (4, 3, 2, 5), "vector": (7,)})
    extra = rule.init_extra(segments, group)
    assert {key: tuple(value.shape) for key, value in extra.items()} == {
        "matrix.row_var": (40, 1),
        "matrix.col_var": (1, 30),
        "conv.row_var": (4, 3, 2, 1),
        "conv.col_var": (4, 3, 1, 5),
        "vector.variance": (7,),
    }
    assert all(value.device.type == "cpu" and value.dtype == torch.float32 for value in extra.values())
    assert rule.slots(group) == ()
    assert not rule.elementwise


@pytest.mark.parametrize(
    ("optimizer_type", "params", "name"),
    [
        ("AdamW", {}, "adamw"),
        ("adamw", {"adam_w_mode": False}, "adamw"),
        ("Adam", {}, "adamw"),
        ("ADAM", {"adam_w_mode": True}, "adamw"),
        ("Adam", {"adam_w_mode": False}, "adam"),
        ("SGD", {}, "sgd"),
        ("Adagrad", {}, "adagrad"),
        ("Adafactor", {}, "adafactor"),
        ("lion", {}, "lion"),
    ],
)
def test_config_types_choose_deepspeeds_maths(optimizer_type, params, name):
    rule, group = rule_from_config(optimizer_type, params)
    assert rule.name == name
    assert group == rule.defaults()


def test_config_params_override_defaults_and_null_means_default():
    params = {"lr": 3e-5, "betas": [0.8, 0.95], "eps": None, "weight_decay": 0.1, "foreach": True, "fused": None}
    _, group = rule_from_config("AdamW", params)
    assert group == {"lr": 3e-5, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1, "bias_correction": True}
    assert params["betas"] == [0.8, 0.95]
    assert rule_from_config("Adafactor", {"eps": [None, 1e-2]})[1]["eps"] == (None, 1e-2)
    assert rule_from_config("SGD", None)[1]["lr"] == 1e-3


def test_weight_decay_defaults_to_that_of_the_optimizer_deepspeed_would_build():
    assert rule_from_config("AdamW", {})[1]["weight_decay"] == 0.0
    assert rule_from_config("AdamW", {"torch_adam": True})[1]["weight_decay"] == 0.01
    assert rule_from_config("Adam", {"torch_adam": True, "adam_w_mode": False})[1]["weight_decay"] == 0.0
    assert rule_from_config("AdamW", {"torch_adam": True, "weight_decay": 0.2})[1]["weight_decay"] == 0.2


@pytest.mark.parametrize(
    ("optimizer_type", "params", "error", "message"),
    [
        ("AdmaW", {}, ValueError, r"optimizer.type='AdmaW'.*AdamW, Adam, SGD, Adagrad, Adafactor, Lion.*mean 'adamw'"),
        ("Muon", {}, ValueError, "optimizer.type='Muon'.*use one of AdamW"),
        ("OneBitAdam", {}, ValueError, "use one of AdamW"),
        (None, {}, TypeError, "optimizer.type=None"),
        ("AdamW", [1e-3], TypeError, r"optimizer.params=\[0.001\]"),
        ("AdamW", {"weigth_decay": 0.1}, ValueError, r"params.weigth_decay=0.1.*lr, betas.*mean 'weight_decay'"),
        ("SGD", {"betas": [0.9, 0.99]}, ValueError, "SGD has no such key"),
        ("AdamW", {"max_grad_norm": 1.0}, ValueError, "gradient_clipping"),
        ("AdamW", {"lr": "1e-3"}, TypeError, "lr='1e-3'.*number >= 0"),
        ("AdamW", {"lr": True}, TypeError, "lr=True"),
        ("AdamW", {"lr": -1}, ValueError, "lr=-1: must be a number >= 0"),
        ("AdamW", {"lr": float("nan")}, ValueError, "lr=nan"),
        ("AdamW", {"betas": 0.9}, TypeError, "betas=0.9: must be a list of 2 numbers"),
        ("AdamW", {"betas": [0.9]}, TypeError, "betas="),
        ("AdamW", {"betas": [0.9, "x"]}, TypeError, r"betas\[1\]='x'"),
        ("AdamW", {"betas": [0.9, 1.0]}, ValueError, r"betas\[1\]=1.0: must be a number >= 0 and < 1"),
        ("AdamW", {"eps": 0}, ValueError, "eps=0: must be a number > 0"),
        ("AdamW", {"amsgrad": True}, ValueError, "amsgrad=True"),
        ("AdamW", {"bias_correction": "no"}, TypeError, "bias_correction='no'"),
        ("AdamW", {"fused": "yes"}, TypeError, "fused='yes'"),
        ("Adam", {"adam_w_mode": "false"}, TypeError, "adam_w_mode='false'"),
        ("Adam", {"fp32_optimizer_states": False}, ValueError, "fp32_optimizer_states=False"),
        ("SGD", {"maximize": True}, ValueError, "maximize=True"),
        ("SGD", {"nesterov": True}, ValueError, "nesterov=True with momentum=0.0.*momentum > 0"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, ValueError, "dampening=0.1"),
        ("SGD", {"momentum": -0.1}, ValueError, "momentum=-0.1"),
        ("Adagrad", {"initial_accumulator_value": -1}, ValueError, "initial_accumulator_value=-1"),
        ("Adagrad", {"eps": 0.0}, ValueError, "eps=0.0: must be a number > 0"),
        ("Lion", {"betas": [-0.1, 0.9]}, ValueError, r"betas\[0\]=-0.1"),
        ("Adafactor", {"d": 0.5}, ValueError, "d=0.5: must be a number >= 1"),
        ("Adafactor", {"beta2_decay": 0.8}, ValueError, "beta2_decay=0.8: must be a number <= 0"),
        ("Adafactor", {"eps": [None, None]}, TypeError, r"eps\[1\]=None"),
        ("Adafactor", {"eps": [-1, 1e-3]}, ValueError, r"eps\[0\]=-1"),
    ],
)
def test_impossible_configs_are_refused_with_the_key_and_what_is_allowed(optimizer_type, params, error, message):
    with pytest.raises(error, match=message):
        rule_from_config(optimizer_type, params)


def test_adagrad_takes_eps_zero_with_a_positive_accumulator():
    assert rule_from_config("Adagrad", {"eps": 0.0, "initial_accumulator_value": 0.1})[0].name == "adagrad"


def _one_parameter():
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    ("optimizer_class", "hyper", "name"),
    [
        (torch.optim.AdamW, {"lr": torch.tensor(1e-3)}, "adamw"),
        (torch.optim.Adam, {}, "adam"),
        (torch.optim.Adam, {"decoupled_weight_decay": True}, "adamw"),
        (torch.optim.SGD, {}, "sgd"),
        (torch.optim.Adagrad, {}, "adagrad"),
        (torch.optim.Adafactor, {}, "adafactor"),
    ],
)
def test_torch_optimizers_are_recognised(optimizer_class, hyper, name):
    assert rule_from_optimizer(optimizer_class(_one_parameter(), **hyper)).name == name


@pytest.mark.parametrize(
    ("module", "class_name", "attributes", "defaults", "name"),
    [
        ("adam.fused_adam", "FusedAdam", {"adam_w_mode": 1}, {"betas": (0.9, 0.99), "bias_correction": True}, "adamw"),
        ("adam.fused_adam", "FusedAdam", {"adam_w_mode": 0}, {"betas": (0.9, 0.99), "bias_correction": True}, "adam"),
        ("adam.cpu_adam", "DeepSpeedCPUAdam", {"adam_w_mode": True}, {"amsgrad": False}, "adamw"),
        ("adam.cpu_adam", "DeepSpeedCPUAdam", {"adam_w_mode": False}, {"amsgrad": False}, "adam"),
        ("adagrad.cpu_adagrad", "DeepSpeedCPUAdagrad", {}, {"eps": 1e-10, "amsgrad": False}, "adagrad"),
        ("lion.fused_lion", "FusedLion", {}, {"betas": (0.9, 0.99)}, "lion"),
        ("lion.cpu_lion", "DeepSpeedCPULion", {}, {"betas": (0.9, 0.99)}, "lion"),
    ],
)
def test_deepspeed_optimizers_are_recognised(module, class_name, attributes, defaults, name):
    cls = getattr(importlib.import_module(f"deepspeed.ops.{module}"), class_name)
    # Their constructors compile C++ or CUDA; class, attributes and groups are all that is read.
    optimizer = cls.__new__(cls)
    torch.optim.Optimizer.__init__(optimizer, _one_parameter(), {"lr": 1e-3, "weight_decay": 0.0, **defaults})
    vars(optimizer).update(attributes)
    assert rule_from_optimizer(optimizer).name == name
    assert rule_from_optimizer(optimizer).slots(optimizer.param_groups[0])


class _CautiousAdamW(torch.optim.AdamW):
    pass


def test_optimizers_without_a_rule_are_refused_with_the_allowed_ones():
    from transformers.optimization import Adafactor

    with pytest.raises(TypeError, match=r"_CautiousAdamW: a subclass of AdamW may change its maths.*pass AdamW itself"):
        rule_from_optimizer(_CautiousAdamW(_one_parameter()))
    with pytest.raises(TypeError, match=r"transformers\.optimization\.Adafactor.*use torch\.optim\.Adafactor"):
        rule_from_optimizer(Adafactor(_one_parameter()))
    with pytest.raises(TypeError, match=r"RMSprop.*torch\.optim\.AdamW.*deepspeed\.ops\.adam\.FusedAdam"):
        rule_from_optimizer(torch.optim.RMSprop(_one_parameter()))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer object"):
        rule_from_optimizer(torch.optim.AdamW)


def test_client_groups_are_checked():
    with pytest.raises(ValueError, match="amsgrad=True"):
        rule_from_optimizer(torch.optim.AdamW(_one_parameter(), amsgrad=True))
    with pytest.raises(ValueError, match="maximize=True"):
        rule_from_optimizer(
            torch.optim.SGD([{"params": _one_parameter()}, {"params": _one_parameter(), "maximize": True}])
        )
    groups = [{"params": _one_parameter()}, {"params": _one_parameter(), "decoupled_weight_decay": True}]
    with pytest.raises(ValueError, match="decoupled_weight_decay=True: must be False in every param group"):
        rule_from_optimizer(torch.optim.Adam(groups))


@pytest.mark.parametrize(("optimizer_class", "hyper"), ELEMENTWISE)
def test_a_fused_update_is_the_eager_one_to_two_spacings(optimizer_class, hyper):
    """From the same gradient; spacings of the largest number that goes into it, the rate (Adam's step) among them."""
    from hift_kernels.grad_norm import prepare
    from hift_kernels.launching import NUM_SCALARS, Weights

    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **hyper)
    rule, group = rule_from_optimizer(optimizer), optimizer.param_groups[0]
    start, grad = _flatten(_parameters()), _flatten(_gradients(1)) * 4
    runs = []
    for fused in (False, True):
        master, state = start.clone(), _new_state(rule, group, start.numel())
        if fused:
            one, scalars = torch.ones(1, dtype=torch.float64), torch.zeros(NUM_SCALARS)
            prepare(one, one * 4, scalars, lr=1e-2, **rule.prepared(group))
            rule.update_fused(grad, Weights("plain", master), state, group, scalars)
        else:
            rule.update(master, grad / 4, state, group, lr=1e-2, step=1)
        runs.append([master, *(state[slot] for slot in rule.slots(group))])
    for eager, fused in zip(*runs, strict=True):
        scale = torch.stack([eager.abs(), start.abs(), grad.abs() / 4, torch.full_like(start, 1e-2)]).amax(dim=0)
        spacing = torch.nextafter(scale, torch.tensor(torch.inf)) - scale
        off = (fused - eager).abs() / spacing
        # Where L2 decay cancels the gradient, Adam's quotient enlarges what the last bit of their sum was.
        assert (off <= 2).float().mean() > 0.999 and off.max() <= 32, off.max()
    assert not torch.equal(runs[1][0], start)


@pytest.mark.parametrize(
    ("master", "moments", "kind", "dtype", "message"),
    [
        ("fp32", "int8", "Adagrad", torch.bfloat16, "hift.state.moments='int8': adagrad keeps .* 'fp32' or 'bf16'"),
        ("fp32", "bf16", "Adafactor", torch.bfloat16, "hift.state.moments='bf16': adafactor keeps them in 'fp32'"),
        ("split16", "fp32", "AdamW", torch.float32, "hift.state.master='split16': needs bf16 .* and these are float32"),
        ("none", "fp32", "AdamW", torch.float16, "hift.state.master='none': needs bf16 .* and these are float16"),
    ],
)
def test_a_form_of_state_that_does_not_go_with_rule_or_weights_is_refused(master, moments, kind, dtype, message):
    with pytest.raises(ValueError, match=message):
        check_form(master, moments, rule_from_config(kind, {})[0], dtype)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD", "Lion"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", ["fp32", "split16", "none"])
def test_these_rules_take_every_form_with_bf16_weights(kind, moments, master):
    check_form(master, moments, rule_from_config(kind, {})[0], torch.bfloat16)
