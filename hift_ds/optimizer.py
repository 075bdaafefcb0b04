"""HiFTOptimizer: reduce, clip, update and rotate, on top of ZeRO 0-3."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer

from hift_ds import checkpoint
from hift_ds.blocks import BlockPlan
from hift_ds.fragments import Fragments
from hift_ds.gradients import GradientReducer
from hift_ds.host_update import HostUpdate
from hift_ds.measure import Measurement, Verdict
from hift_ds.param_groups import group_indices
from hift_ds.rotation import Rotation
from hift_ds.rules import Rule
from hift_ds.schedule import DelayedRate
from hift_ds.settings import Settings
from hift_ds.shards import BlockShard, is_partitioned
from hift_ds.state import BlockState, Storage, make_states
from hift_ds.update import BlockUpdate, Scaling

logger = logging.getLogger(__name__)


class HiFTOptimizer(ZeROOptimizer):
    """Owns gradients, master weights and state, and of these only the active block's are on the device.

    DeepSpeed's engine owns everything else and talks to this class through the attributes that `hift_ds.surface`
    names.

    Args:
        holder: A torch optimizer whose param groups hold the hyper-parameters (schedulers write there); it is never
            stepped and has no state.
        rule: The update rule.
        plan: Blocks, always-active and frozen parameters.
        params: Every trainable parameter by name.
        rotation: The order of blocks and the position in it.
        reducer: Brings gradients to this rank's shard.
        loss_scaler: DeepSpeed's loss scaler (scale 1 outside fp16).
        offload: DeepSpeed's ZeRO-3 parameter manager; `None` below stage 3.
        lr_update: See `hift_ds.schedule`.
        device: Where the model is.
        group: The data-parallel process group.
        settings: The rest.
    """

    custom_loss_scaler = False
    torch_autocast_gradscaler = None

    def __init__(
        self,
        *,
        holder: torch.optim.Optimizer,
        rule: Rule,
        plan: BlockPlan,
        params: dict[str, torch.nn.Parameter],
        rotation: Rotation,
        reducer: GradientReducer,
        loss_scaler: Any,
        offload: Any,
        lr_update: str,
        device: torch.device,
        group: object,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.optimizer, self.rule, self.plan, self.rotation = holder, rule, plan, rotation
        self.reducer, self.loss_scaler, self.offload = reducer, loss_scaler, offload
        self.settings, self.device, self.group = settings, device, group
        self.dynamic_loss_scale = bool(loss_scaler.dynamic)
        self.overflow = False
        self._global_grad_norm = 0.0
        self.load_weights_only = self._loads = False
        self.save_mark: str | None = None  # of the last save
        self.scheduler: Any = None  # the one that the engine steps; set when the engine has built it
        self.rate = DelayedRate(holder.param_groups, lr_update, rotation.steps_per_cycle)
        if settings.stage > 0:
            self.dp_process_group = group  # tells DeepSpeed that every rank saves an optimizer file
        self._shard_world = settings.world if settings.stage > 0 else 1
        group_of = group_indices(holder.param_groups, params)
        rank = dist.get_rank(group=group) if self._shard_world > 1 else 0

        def shard(fqns: tuple[str, ...]) -> BlockShard:
            return BlockShard([(fqn, params[fqn]) for fqn in fqns], group_of, self._shard_world, rank)

        storage = settings.storage(device)
        self.states, self.ring = make_states(
            [shard(block.fqns) for block in plan.blocks], rule, holder.param_groups, storage, settings.ring_bytes
        )
        self.always = None
        if plan.always_active:
            on_device = Storage(device, settings.form)
            self.always = BlockState(shard(plan.always_active), rule, holder.param_groups, on_device)
        self.update = BlockUpdate(
            rule, holder.param_groups, device, self._sum_over_shards, settings.kernel, self.ring, settings.seed
        )
        self.host_update = None
        if settings.on_host:
            self.host_update = HostUpdate(rule, holder.param_groups, device, self._sum_over_shards, self.states)
        # Where nothing needs to know on the host how a step's gradients are, it does not wait for the device.
        self._waits = settings.kernel != "triton" or settings.on_host or bool(loss_scaler.dynamic)
        self._unread: tuple[Measurement, int, list[BlockState]] | None = None
        self._coordinators: dict[int, Any] = {}
        self._warned: set[str] = set()
        self._register_hooks()
        self.activate()
        Fragments(self)  # deepspeed.utils.safe_get_full_fp32_param and its kin

    # What DeepSpeed's engine, its checkpoint files and its schedulers read.

    @property
    def param_groups(self) -> list[dict]:
        """The holder's param groups: the rate here is the scheduler's, `rates` is the one in force."""
        return self.optimizer.param_groups

    @property
    def bit16_groups(self) -> list[list[torch.nn.Parameter]]:
        """Every trained parameter, in shard order, a list per block."""
        return [list(state.shard.params) for state in self._all_states()]

    fp16_groups = bit16_groups

    @property
    def loss_scale(self) -> float:
        """The loss scale in force (1 outside fp16)."""
        return self.loss_scaler.loss_scale

    cur_scale = loss_scale

    @property
    def rates(self) -> list[float]:
        """Learning rate in force, one per param group."""
        return list(self.rate.rates or [float(group["lr"]) for group in self.param_groups])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that are still on parameters; those already reduced stay until `step`."""
        for state in self.active_states():
            for param in state.shard.params:
                param.grad = None

    def backward_epilogue(self, **kwargs: Any) -> None:
        """Stage 3: releases what a backward that stopped early has left gathered."""
        if self.offload is not None:
            self.offload.release_backward_leftovers()

    def finalize_gradient_accumulation_boundary(self) -> None:
        """Called at the boundary with `managed_gradient_accumulation: false`; each backward has already reduced."""

    def checkpoint_event_prologue(self) -> None:
        """Stage 3: partitions everything, so that saving and loading see shards. Collective."""
        if self.offload is not None:
            self.offload.partition_all_parameters()

    def checkpoint_event_epilogue(self) -> None:
        """Stage 3: gathers the small persistent parameters again. Collective."""
        if self.offload is not None and self.offload.persistent_parameters and not self._loads:
            self.offload.persistent_parameters[0].all_gather(self.offload.persistent_parameters)

    def refresh_fp32_params(self) -> None:
        """Takes every master weight anew from the model weights (a load of weights alone)."""
        self.settle()
        for state in self._all_states():
            state.refresh_master()

    _restore_from_bit16_weights = refresh_fp32_params

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer: position, rates, masters and state of every block."""
        return checkpoint.optimizer_state(self)

    def load_state_dict(self, state_dict_list: Any, load_optimizer_states: bool = True, **_: Any) -> None:
        """Restores `state_dict`; DeepSpeed passes one per rank (stages 1-3) or the whole (stage 0)."""
        checkpoint.load_optimizer_state(self, state_dict_list, load_optimizer_states and not self.load_weights_only)

    # Rotation.

    def active_states(self) -> list[BlockState]:
        """The active block's state, then the always-active parameters', as `activate` left them."""
        return self._active

    def activate(self) -> None:
        """Makes the rotation's active block, and no other, require gradients."""
        active = [self.states[self.rotation.active_block]]
        self._active = active = active if self.always is None else [*active, self.always]
        wanted = {id(param) for state in active for param in state.shard.params}
        for state in self._all_states():
            for param in state.shard.params:
                param.requires_grad_(id(param) in wanted)
        self.reducer.open(state.shard for state in active)
        if self.offload is not None:
            self._swap_coordinator()

    @contextmanager
    def all_trainable(self, also: Iterable[torch.nn.Parameter] = ()) -> Iterator[None]:
        """Inside, inactive parameters (`also` others) do not look frozen to DeepSpeed's checkpoint code."""
        params = {param: param.requires_grad for state in self._all_states() for param in state.shard.params}
        params.update((param, param.requires_grad) for param in also if param.is_floating_point())
        try:
            for param in params:
                param.requires_grad_(True)
            yield
        finally:
            for param, flag in params.items():
                param.requires_grad_(flag)

    @contextmanager
    def loading(self, weights_only: bool, params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Around DeepSpeed's load, which issues no collective inside: a rank that fails leaves no other waiting.

        Args:
            weights_only: What `load_state_dict` shall take.
            params: The whole model's.
        """
        self.load_weights_only, self._loads = weights_only, True
        # Below stage 3 the model file has every weight, and DeepSpeed would want what is frozen now to have been then.
        whole_in_model_file = self.settings.stage < 3
        try:
            with self.all_trainable(params if whole_in_model_file else ()):
                yield
        finally:
            self.load_weights_only = self._loads = False
            self.activate()
        self.checkpoint_event_epilogue()

    def _all_states(self) -> list[BlockState]:
        return self.states if self.always is None else [*self.states, self.always]

    def _swap_coordinator(self) -> None:
        # ZeRO-3 records which modules run in which order and prefetches by it. Each block has its own trace (its
        # backward stops elsewhere); one coordinator for all would throw its trace away again and again top-down.
        block = self.rotation.active_block
        if block not in self._coordinators:
            first = not self._coordinators
            self._coordinators[block] = self.offload.param_coordinator if first else self.offload.new_coordinator()
        self.offload.param_coordinator = self._coordinators[block]

    def _register_hooks(self) -> None:
        for state in self._all_states():
            for param in state.shard.params:
                # A partitioned parameter has shape 0, and so would the gradient that autograd expects for it.
                gathered = is_partitioned(param)
                if gathered:
                    param.all_gather()
                param.requires_grad_(True)
                param.register_post_accumulate_grad_hook(self._on_gradient)
                if gathered:
                    param.partition()

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        self.reducer.on_gradient(param)
        self.queue_post_backward_callback()

    # The step.

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One optimizer step of the active block (and the always-active parameters), then the rotation moves on.

        Collective. A gradient that is not finite changes no weight and no state. Where the host waits for the device
        (eager rules, updates on the host, dynamic loss scales) it changes nothing but the loss scale: no schedule, no
        rotation. Otherwise the kernels leave the update out by themselves, the block's turn passes, and the host hears
        of it at the next step.
        """
        self._hear()
        states = self.active_states()
        grads, touched = map(list, zip(*(self.reducer.take(state.shard) for state in states), strict=True))
        if self.offload is not None:
            self.offload.partition_all_parameters()
        measured = Measurement(
            grads, reached=len(touched[0]), block=self.rotation.active_block, stage=self.settings.stage,
            world=self.settings.world, group=self.group, fused=self.settings.kernel == "triton",
        )  # fmt: skip
        self.overflow = False
        norm = None
        if self._waits:
            verdict = measured.verdict()
            self._refuse(verdict, self.rotation.active_block)
            self.overflow = not verdict.finite
            norm = verdict.norm / self.loss_scale
        self._warn_partial(states[0], touched[0])
        if not self.overflow:
            self._global_grad_norm = measured.square.sqrt().squeeze() / self.loss_scale if norm is None else norm
            self._apply(states, grads, Scaling(self.loss_scale, self.settings.clip, norm, measured.square))
        if not self._waits:
            measured.send()
            self._unread = (measured, self.rotation.active_block, states)
        self.loss_scaler.update_scale(self.overflow)
        if self.offload is not None and self.offload.allgather_stream is not None:
            # DeepSpeed gathers there what has just been written here.
            self.offload.allgather_stream.wait_stream(get_accelerator().current_stream())
        self.checkpoint_event_epilogue()
        if not self.overflow:
            self.optimizer._opt_called = True  # torch's schedulers warn when they see no step of "their" optimizer
            if self.rotation.advance():
                self.activate()
            if self.ring is not None:
                self.ring.prefetch(self.active_states()[0].tiles)  # during the coming forward and backward

    def settle(self) -> None:
        """Before the host reads or changes state: all updates have landed there and have been checked."""
        self._hear()
        if self.ring is not None:
            self.ring.settle()
        if self.device.type == "cuda":  # extra tensors go back to the host with the update itself
            torch.cuda.current_stream(self.device).synchronize()

    def _hear(self) -> None:
        """Reads what the last step did not wait for."""
        if self._unread is None:
            return
        (measured, block, states), self._unread = self._unread, None
        verdict = measured.verdict()
        if not verdict.good:
            for state in states:
                state.step -= 1  # nothing was stored
        self._refuse(verdict, block)
        if not verdict.finite:
            logger.warning(
                "the gradient of block %d (%s) was not finite; its update was left out", block,
                self.plan.blocks[block].name,
            )  # fmt: skip

    def _refuse(self, verdict: Verdict, block: int) -> None:
        """Raises RuntimeError, on every rank, if an update would be lost."""
        if not verdict.agreed:
            raise RuntimeError(f"ranks disagree on the active block (here {block}); was a rank restarted alone?")
        if not verdict.reached:
            raise RuntimeError(self.no_gradient_message(block))

    def _apply(self, states: list[BlockState], grads: list[torch.Tensor], scaling: Scaling) -> None:
        if self.settings.reset_state and self.rotation.at_turn_start:
            self.settle()
            states[0].reset()
        rates = self.rate.update(self.rotation.at_cycle_start, self.scheduler)
        for index, state in enumerate(states):
            block = self.rotation.active_block if state is states[0] else len(self.states)
            update = self.host_update if self.host_update is not None and state.streams else self.update
            weights = update.run(state, grads[index], scaling, rates, block)
            grads[index] = torch.empty(0)  # free before the next allocation
            state.shard.write_weights(weights, self.group, self.settings.publish_numel)

    def _sum_over_shards(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._shard_world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def no_gradient_message(self, block: int) -> str:
        """Why a step of a block cannot be made, and what to do."""
        return (
            f"block {block} ({self.plan.blocks[block].name}) received no gradient on any rank, so its update would be "
            "lost: either the loss does not depend on it (add it to hift.frozen), or reentrant activation "
            "checkpointing cut it off (pass use_reentrant=False)"
        )

    def _warn_partial(self, state: BlockState, touched: set[torch.nn.Parameter]) -> None:
        block = self.rotation.active_block
        missing = [fqn for fqn, param in zip(state.shard.fqns, state.shard.params, strict=True) if param not in touched]
        key = f"partial {block}"
        if missing and key not in self._warned:
            self._warned.add(key)
            logger.warning(
                "block %d (%s): no gradient for %s on this rank; counted as zero, as DeepSpeed does",
                block, self.plan.blocks[block].name, ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else ""),
            )  # fmt: skip
