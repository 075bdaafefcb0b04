"""Cases of the peers: optimizers, hooks, schedules and configs as users hand them over."""

from __future__ import annotations

import base64
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from hift_testing.peer_cases import (
    HYPER,
    ONE_BLOCK,
    Stack,
    TorchHiFT,
    adamw,
    blocks_of,
    config_of,
    data,
    distance,
    error_of,
    loss_of,
    messages,
    run,
    train_step,
    weights_of,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import hift_ds


def _initialize(module: nn.Module, stage: int, hift: Any = None, dtype: str = "fp32", gas: int = 1, **keys: Any) -> Any:
    """HiFT with arguments of `initialize` (capitals are keys of the config)."""
    config = config_of(stage, dtype, hift or {}, gas, **{k.lower(): v for k, v in keys.items() if k.isupper()})
    arguments = {key: value for key, value in keys.items() if not key.isupper()}
    if "optimizer" in arguments:
        config.pop("optimizer")
    return hift_ds.initialize(model=module, config=config, **arguments)[0]


def foreign_parameters(stage: int, how: str) -> str:
    """Learned loss weights beside the model, given to the optimizer: alone in a group, or within the model's."""
    module, weight = Stack(), nn.Parameter(torch.zeros(2))
    params = list(module.parameters())
    groups = {
        "own group": [{"params": params}, {"params": [weight]}],
        "within a group": [{"params": params[:2]}, {"params": [*params[2:], weight]}],
    }[how.removesuffix(" of model_parameters")]
    if how.endswith("model_parameters"):
        return error_of(lambda: _initialize(module, stage, model_parameters=groups))
    return error_of(lambda: _initialize(module, stage, optimizer=adamw(groups)))


def step_hooks(stage: int, gas: int, spoilt: int | None, steps: int = 6) -> dict[str, Any]:
    """Hooks of a client optimizer, registered before and after `initialize`: how often they run, by step.

    Args:
        spoilt: Step at which a gradient is not finite: it is not applied.
    """
    module = Stack()
    client, calls, seen, of_all = adamw(module.parameters()), [], [], []
    client.register_step_pre_hook(lambda *_: calls.append("pre"))
    client.register_step_post_hook(lambda *_: calls.append("post"))
    engine = _initialize(module, stage, gas=gas, optimizer=client)
    client.register_step_post_hook(lambda *_: seen.append(True))
    handle = register_optimizer_step_post_hook(lambda *_: of_all.append(True))
    by_step = []
    for step in range(steps):
        calls.clear()
        for micro in range(gas):
            loss = loss_of(engine(data(step, micro)))
            engine.backward(loss * float("nan") if step == spoilt else loss)
            engine.step()
            if micro + 1 < gas and calls:
                calls.append("within the window")
        by_step.append(list(calls))
    handle.remove()
    return {"calls": by_step, "late hook": len(seen), "of all optimizers": len(of_all)}


def projecting_hook(stage: int) -> dict[str, Any]:
    """A post hook that clamps weights, as one for spectral norms or weight clipping does."""
    module = Stack()
    client = adamw(module.parameters())

    def clamp(contestant: nn.Module) -> None:
        with torch.no_grad():
            for param in contestant.parameters():
                param.clamp_(-0.2, 0.2)

    client.register_step_post_hook(lambda *_: clamp(module))
    engine = _initialize(module, stage, optimizer=client)
    oracle = TorchHiFT(Stack(), blocks_of(engine))
    start = weights_of(oracle)
    for step in range(6):
        train_step(engine, step)
        train_step(oracle, step)
        for name, param in oracle.named.items():
            oracle.write(name, param.detach().clamp(-0.2, 0.2))
    return {"distance": distance(weights_of(engine), weights_of(oracle), start)}


def changed_groups(stage: int, how: str) -> dict[str, Any]:
    """Parameters that come to a client optimizer during a run; then they are taken away again."""
    module = Stack()
    client = adamw([param for name, param in module.named_parameters() if not name.startswith("head")])
    engine = _initialize(module, stage, optimizer=client)
    run(train_step, engine, 2)
    start, head = weights_of(engine), list(module.head.parameters())
    if how == "group":
        client.add_param_group({"params": head})
    else:
        client.param_groups[0]["params"].extend(head)
    error = error_of(lambda: train_step(engine, 2))
    moved = [name for name, weight in weights_of(engine).items() if not torch.equal(weight, start[name])]
    if how == "group":
        del client.param_groups[1]
    else:
        del client.param_groups[0]["params"][-len(head):]
    return {"error": error, "moved": moved, "again": error_of(lambda: run(train_step, engine, 3, 2))}


def replaced_step(stage: int, by: str) -> str:
    """`step` of a client optimizer object is another one: the user's, or what torch's schedulers put there."""
    module = Stack()
    client = adamw(module.parameters())
    if by == "user":
        own = client.step
        client.step = lambda closure=None: own(closure)
    else:
        torch.optim.lr_scheduler.ConstantLR(client)
    return error_of(lambda: _initialize(module, stage, optimizer=client))


def step_replaced_in_a_run(stage: int) -> str:
    """The same after `initialize`."""
    module = Stack()
    client = adamw(module.parameters())
    engine = _initialize(module, stage, optimizer=client)
    run(train_step, engine, 1)
    client.step = lambda closure=None: None
    return error_of(lambda: run(train_step, engine, 1, 1))


def wrong_schedule(stage: int) -> dict[str, Any]:
    """A config whose scheduler has no such parameter, for the model of a living engine."""
    module = Stack()
    engine = _initialize(module, stage)
    error = error_of(lambda: _initialize(module, stage, SCHEDULER={"type": "WarmupLR", "params": {"steps": 4}}))
    return {"error": error, "goes on": error_of(lambda: run(train_step, engine, 3))}


def used_optimizer(stage: int) -> dict[str, Any]:
    """A client optimizer that has already taken steps."""
    module = Stack()
    client = adamw(module.parameters())
    for step in range(2):
        loss_of(module(data(step))).backward()
        client.step()
        client.zero_grad()
    with messages() as read:
        engine = _initialize(module, stage, optimizer=client)
        run(train_step, engine, 4)
    return {"warnings": [text for text in read if "state" in text and "optimizer" in text]}


def changed_rule(stage: int, rule: str, key: str, value: Any, after: int = 2) -> dict[str, Any]:
    """A hyper-parameter of the returned optimizer is changed during a run; `after` it is set back."""
    params = {"SGD": {"lr": 1e-2}, "AdamW": HYPER, "Lion": {"lr": 1e-3}}[rule]
    module = Stack()
    engine = _initialize(module, stage, OPTIMIZER={"type": rule, "params": dict(params)})
    run(train_step, engine, after)
    groups = engine.optimizer.param_groups
    old = groups[0].get(key)
    start = weights_of(engine)
    groups[0][key] = value
    error = error_of(lambda: run(train_step, engine, 1, after))
    moved = [name for name, weight in weights_of(engine).items() if not torch.equal(weight, start[name])]
    if old is None:
        del groups[0][key]
    else:
        groups[0][key] = old
    again = error_of(lambda: run(train_step, engine, 3, after))
    return {"error": error, "moved": moved, "again": again}


def maximized(stage: int, late: bool) -> dict[str, Any]:
    """`maximize=True` of a client optimizer: the oracle's, or one clear error."""
    module = Stack()
    client = adamw(module.parameters(), maximize=not late)
    found = {"error": "", "distance": 0.0}
    try:
        engine = _initialize(module, stage, optimizer=client)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "distance": 0.0}
    oracle = TorchHiFT(Stack(), blocks_of(engine), maximize=not late)
    start = weights_of(oracle)
    for step in range(6):
        if late and step == 3:
            for holder in (engine.optimizer, *oracle.rules):
                for group in holder.param_groups:
                    group["maximize"] = True
        found["error"] = error_of(lambda s=step: train_step(engine, s))
        if found["error"]:
            return found
        train_step(oracle, step)
    found["distance"] = distance(weights_of(engine), weights_of(oracle), start)
    return found


def config_forms(stage: int, folder: str) -> dict[str, Any]:
    """One config as dict, path, base64 and through `args`: the same run each time; here with one block, as plain."""
    found, right = {}, None
    for way, hift in (("hift", {}), ("one block", ONE_BLOCK)):
        config = config_of(stage, hift=hift)
        path = Path(folder, f"{way} {stage} {dist.get_rank()}.json")
        path.write_text(json.dumps(config))
        forms: dict[str, dict[str, Any]] = {
            "dict": {"config": config},
            "path": {"config": str(path)},
            "Path": {"config": path},
            "base64": {"config": base64.urlsafe_b64encode(json.dumps(config).encode()).decode()},
            "config_params": {"config_params": config},
            "args": {"args": Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())},
        }
        for form, arguments in forms.items():
            try:
                engine = hift_ds.initialize(model=Stack(), **arguments)[0]
            except Exception as error:
                found[f"{way}: {form}"] = f"{type(error).__name__}: {error}"
                continue
            run(train_step, engine, 4)
            weights = weights_of(engine)
            right = weights if form == "dict" else right
            same = all(torch.equal(weight, right[name]) for name, weight in weights.items())
            found[f"{way}: {form}"] = "" if same and hasattr(engine, "hift") else "another run"
    return found


def plain_forms(stage: int, folder: str) -> dict[str, str]:
    """The same forms without the section, to know which DeepSpeed itself takes."""
    found, config = {}, config_of(stage)
    path = Path(folder, f"plain {stage} {dist.get_rank()}.json")
    path.write_text(json.dumps(config))
    forms: dict[str, dict[str, Any]] = {
        "path": {"config": str(path)}, "Path": {"config": path},
        "base64": {"config": base64.urlsafe_b64encode(json.dumps(config).encode()).decode()},
        "config_params": {"config_params": config},
        "args": {"args": Namespace(deepspeed_config=str(path), local_rank=dist.get_rank())},
    }  # fmt: skip
    for form, arguments in forms.items():
        for name, initialize in (("deepspeed", deepspeed.initialize), ("hift_ds", hift_ds.initialize)):
            module = Stack()
            optimizer = adamw(module.parameters())
            make = lambda i=initialize, m=module, o=optimizer, a=arguments: i(model=m, optimizer=o, **a)  # noqa: E731
            found[f"{name}: {form}"] = error_of(make)
    return found


def handed_over(stage: int, dtype: str, clip: float) -> dict[str, float]:
    """An optimizer from the config, as object and as callable; a scheduler as object and as callable; all one run."""
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    def make(hift: dict[str, Any], how: str) -> Any:
        module = Stack()
        client = adamw(module.parameters())
        arguments: dict[str, Any] = {
            "callables": {"optimizer": adamw, "lr_scheduler": schedule},
            "objects": {"optimizer": client, "lr_scheduler": schedule(client)},
            "object and callable": {"optimizer": client, "lr_scheduler": schedule},
            "config and callable": {"lr_scheduler": schedule},
        }[how]
        return _initialize(module, stage, {**hift, "lr_update": "step"}, dtype, GRADIENT_CLIPPING=clip, **arguments)

    plain_module = Stack()
    client = adamw(plain_module.parameters())
    plain = deepspeed.initialize(
        model=plain_module, config=config_of(stage, dtype, None, gradient_clipping=clip), optimizer=client,
        lr_scheduler=schedule,
    )[0]  # fmt: skip
    start = weights_of(plain)
    run(train_step, plain, 5)
    found, first = {}, None
    for how in ("config and callable", "callables", "objects", "object and callable"):
        one, many = make(ONE_BLOCK, how), make({}, how)
        run(train_step, one, 5)
        run(train_step, many, 5)
        first = first or weights_of(many)
        found[f"{how}, one block"] = distance(weights_of(one), weights_of(plain), start)
        found[f"{how}, rotating"] = distance(weights_of(many), first, start)
    return found
