"""HiFTOptimizer: reduce, clip, update and rotate, on top of ZeRO 0-3."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from hift_ds.checkpoint import in_memory
from hift_ds.checkpoint.content import RunState
from hift_ds.compiled_layers import let_dynamo_see_changes
from hift_ds.config.resolve import ResolvedConfig
from hift_ds.distributed import agree
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.rotation import Rotation
from hift_ds.rotation.schedule import DelayedRate
from hift_ds.shards import UnitShard
from hift_ds.state.unit_state import UnitState, host_memory
from hift_ds.zero.answers import ReadByDeepSpeed
from hift_ds.zero.attachment import Attachment, Flags
from hift_ds.zero.backward_step import BackwardStep
from hift_ds.zero.fragments import Fragments
from hift_ds.zero.gradients import GradientReducer
from hift_ds.zero.guard import ModuleGuard
from hift_ds.zero.offload import STATES, WEIGHTS
from hift_ds.zero.reach import Reach
from hift_ds.zero.states import States
from hift_ds.zero.step import Step
from hift_ds.zero.traces import Traces, leave_inference_mode
from hift_ds.zero.unit_gradients import HostGradients, UnitReducer, host_gradient_numel

logger = logging.getLogger(__name__)
ENDED = (
    "this engine has ended: destroy() was called, or a later hift_ds.initialize took its model over; use the engine "
    "that it returned"
)


class HiFTOptimizer(ReadByDeepSpeed):
    """Owns gradients, master weights and state, and of these only the active block's are on the device.

    DeepSpeed's engine owns everything else and talks to this class through the attributes that `hift_ds.config.surface`
    names.

    Args:
        holder: A torch optimizer whose param groups hold the hyper-parameters (schedulers write there); it is never
            stepped and has no state.
        plan: Blocks, always-active and frozen parameters.
        module: The model.
        params: Every trainable parameter by name.
        as_found: `requires_grad` of the model's parameters before `initialize`.
        loss_scaler: DeepSpeed's loss scaler (scale 1 outside fp16).
        offload: DeepSpeed's ZeRO-3 parameter manager; `None` below stage 3.
        device: Where the model is.
        group: The data-parallel process group.
        config: The rest.
    """

    custom_loss_scaler = False
    torch_autocast_gradscaler = None

    def __init__(
        self, *, holder: torch.optim.Optimizer, plan: BlockPlan, module: torch.nn.Module,
        params: dict[str, torch.nn.Parameter], as_found: Flags, loss_scaler: Any, offload: Any, device: torch.device,
        group: object, config: ResolvedConfig,
    ) -> None:  # fmt: skip
        super().__init__()
        self.optimizer, self.rule, self.plan = holder, config.rule, plan
        self.loss_scaler, self.offload = loss_scaler, offload
        hift = config.hift
        self.rotation = Rotation(len(plan.blocks), hift.order, hift.seed, hift.steps_per_block)
        self.config, self.device, self.group, self._module = config, device, group, module
        self.dynamic_loss_scale = bool(loss_scaler.dynamic)
        self.overflow = False
        self._saves = self._loads = False  # the engine does, and has our part of it
        # While a save goes on: before a block's turn, and before other changes of state.
        self.before_turn: Callable[[int], None] | None = None
        self.before_change: Callable[[], None] | None = None
        self.rate = DelayedRate(holder.param_groups, hift.lr_update, self.rotation.steps_per_cycle)
        if config.stage > 0:
            self.dp_process_group = group  # tells DeepSpeed that every rank saves an optimizer file
        self._kept = States(plan, params, holder.param_groups, config, device, group)
        in_backward = hift.update == "backward"
        self.reducer = self._unit_reducer() if in_backward else GradientReducer(config, group)
        self.reach = Reach(plan, hift.no_gradient)
        self.guard = ModuleGuard(module, params)
        self._step = (BackwardStep if in_backward else Step)(
            config=config, plan=plan, states=self._kept, holder=holder, reducer=self.reducer, rotation=self.rotation,
            rate=self.rate, reach=self.reach, guard=self.guard, loss_scaler=loss_scaler, device=device, group=group,
        )  # fmt: skip
        self._traces = None if offload is None else Traces(offload)
        self._attachment = Attachment(module, params.values(), self._on_gradient, self.zero_grad, as_found)
        self._fragments = Fragments(  # deepspeed.utils.safe_get_full_fp32_param and its kin
            self._kept.all, device, group, self._bring_up_to_date, self.reducer.averaged
        )
        self._active: list[UnitState] = []
        self._begun = self._warned_of_direct = self._aside = False
        self._scheduler: Any = None
        self.window_cut = False  # the window's gradients were dropped with an interrupted backward
        for param in params.values():
            param.grad = None
        self._attachment.attach()
        self._fragments.attach()
        # A client optimizer's own would leave what has been reduced.
        holder.zero_grad = self.zero_grad  # type: ignore[method-assign]
        self.activate()

    def step_aside(self) -> None:
        """Until `step_back` the model's flags are as the user had them; a window that has begun stays as it is."""
        self._attachment.restore_flags()
        self._aside = True

    def step_back(self) -> None:
        """The flags are those of the present turn again."""
        self._aside = False
        let_dynamo_see_changes()
        self._attachment.freeze_untrained()
        for state in self._kept.all:
            for param in state.shard.params:
                param.requires_grad_(param in self._active_params)

    def destroy(self) -> None:
        """The module is as it was before, at stage 3 partitioned; frees masters and state.

        A last step that was not good is a warning. May be called again.
        """
        if not self.states:
            return
        self.reload_states()  # `finish` reads them
        self.finish("destroy()")
        self.reducer.discard()
        self.reducer.open(())
        self._fragments.detach()
        self._attachment.detach()
        vars(self.optimizer).pop("zero_grad", None)
        if self._traces is not None:
            self.checkpoint_event_prologue()
            self._traces.end()
            self.offload.destroy()
        self.unregister_grad_acc_post_hooks()
        self._kept.clear()
        self._active = []
        self._traces = self.offload = None
        del self._step, self._fragments

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients of the window, those that have been reduced too, and those of an interrupted backward."""
        if not self.states:  # after `destroy`
            return
        if self._step.half_made and not self.interrupted and not self._aside:
            raise RuntimeError(
                "hift.update='backward': zero_grad() cannot drop this window's update, which its backward has made: "
                'call engine.step() first; for gradients that are not to train use "update": "step"'
            )
        self._drop_window()

    def abandon_step(self) -> None:
        """After an error in `step`: its window is over, and a part of its update may be made."""
        if self.states:
            self._drop_window(failed=True)

    def _drop_window(self, failed: bool = False) -> None:
        self._mark_half_made(failed)
        interrupted = self.interrupted
        self.reducer.discard()
        self._step.drop()
        self.clear_backward_seen_flag()
        self.exit_backward()
        if interrupted:
            self.window_cut = True
            if self._traces is not None:
                self.checkpoint_event_prologue()
                self._traces.forget()

    def _mark_half_made(self, failed: bool = False) -> None:
        """A backward or a step that ended with an error has updated some of the active block's units, others not."""
        if (failed or self.interrupted) and self._step.half_made:
            for state in self._active:
                state.torn = True

    def end_window(self) -> None:
        """The next window begins with the next batch; the engine, which counts micro steps, puts its own here."""

    def begin_forward(self) -> None:
        """Before a forward that may have a backward."""
        self.require_whole()
        if torch._C._current_graph_task_id() == -1:  # else a checkpointed forward runs again, inside its backward
            self._leave_interrupted()
        if self._aside:
            self.step_back()
        self._begun = True
        self.guard.stop_inactive(self._active_params)

    @property
    def interrupted(self) -> bool:
        """Whether the last backward ended with an error (entered, never left) and has left a part of a gradient."""
        return self._backward_active_depth > 0

    def begin_backward(self) -> None:
        """Before `engine.backward`."""
        self.require_whole()
        self._leave_interrupted()
        self._begun = True

    def _leave_interrupted(self) -> None:
        self.drop_interrupted()
        if self.window_cut:  # and no `step` of the engine has counted it as a micro step
            self.window_cut = False
            self.end_window()

    def drop_interrupted(self) -> None:
        """Before the next backward: what an interrupted one has left must not enter an update."""
        if self.interrupted:
            logger.warning("the last backward ended with an error: all gradients of its window are dropped")
            self.zero_grad()

    def finish_backward(self, boundary: bool) -> None:
        """After each backward: gradients that are left are reduced, new weights have arrived. Collective."""
        self.reducer.finish_backward(boundary)
        self._step.arrive()

    def exit_backward(self) -> None:
        """Ends a backward, which begins once for every output of `forward` in its loss."""
        self._backward_active_depth = 0

    def offload_states(
        self, include: Any = None, device: Any = None, pin_memory: bool = True, non_blocking: bool = False
    ) -> None:
        """What of weights, masters and moments is on the device goes to the host; `reload_states` brings it back.

        Args:
            include: DeepSpeed's OffloadStateTypeEnum members; `None` = all. Gradients stay: none is kept beyond a step.
        """
        wanted = {WEIGHTS, *STATES} if include is None else {getattr(kind, "value", kind) for kind in include}
        wanted -= self._kept.offloaded.kinds
        self.checkpoint_event_prologue()
        if wanted & STATES and not self._kept.offloaded.kinds & STATES:
            self.settle()
        weights = [getattr(param, "ds_tensor", param) for param in self._module.parameters()]
        self._kept.offload(wanted, weights, pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """The inverse of `offload_states`."""
        if self._kept.offloaded.kinds:
            self._kept.offloaded.reload()
            self.checkpoint_event_epilogue()

    def require_states(self, *kinds: str) -> None:
        """Raises RuntimeError while one of these kinds, or any without them, is offloaded."""
        self._kept.require_here(*kinds)

    def require_whole(self) -> None:
        """Raises RuntimeError where an update has ended with an error half way (out of memory)."""
        self._mark_half_made()
        self._kept.require_whole()

    def refresh_fp32_params(self) -> None:
        """Takes every master weight anew from the model weights (a load of weights alone)."""
        self.settle()
        for state in self._kept.all:
            state.refresh_master()
            state.torn = False
            self.guard.note(state.shard)

    _restore_from_bit16_weights = refresh_fp32_params

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the optimizer: facts of the run, and tensors by file and name, which are no copies."""
        if self._saves:
            return {}
        return in_memory.state_of(self.settled_run())

    def load_state_dict(self, state_dict_list: Any, load_optimizer_states: bool = True, **_: Any) -> None:
        """Restores what `state_dict` has given on every rank, as a list by rank, or on a lone one or at stage 0."""
        if not self._loads:
            self.settle()
            in_memory.restore(self.run_state, self._module, state_dict_list, load_optimizer_states)
            self.reducer.discard()

    @property
    def run_state(self) -> RunState:
        """What a checkpoint holds."""
        return RunState(
            self._kept.blocks, self.always, self.rule.name, self.config.stage, self.config.world, self.rotation,
            self.rate, self.param_groups, self.loss_scaler, self.scheduler,
        )  # fmt: skip

    def settled_run(self) -> RunState:
        """`run_state`, all of which has landed where it is at home. Collective.

        Raises:
            RuntimeError: States are offloaded, the module has other parameters, or the last step was not good.
        """
        self.require_states()
        agree(self.require_same_module)
        self.require_whole()
        if self._step.half_made:
            raise RuntimeError(
                "hift.update='backward': the update of this window is made, and engine.step() has not counted it yet: "
                "call engine.step() before a save"
            )
        self.settle()
        self._step.adopt_writes(self._kept.all)
        return self.run_state

    @property
    def trained(self) -> set[torch.nn.Parameter]:
        """All parameters of blocks and those that are always active."""
        return {param for state in self._kept.all for param in state.shard.params}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around DeepSpeed's save, which is not to write the optimizer."""
        self._saves = True
        try:
            with self.all_trainable():
                yield
        finally:
            self._saves = False

    # Rotation.

    def active_states(self) -> list[UnitState]:
        """Those of the active block's units, then the always-active parameters', as `activate` left them."""
        return self._active

    def activate(self) -> None:
        """Makes the rotation's active block, and no other, require gradients."""
        if self.before_turn is not None:
            self.before_turn(self.rotation.active_block)
        self._active = active = self._kept.training(self.rotation.active_block)
        self._active_params = {param for state in active for param in state.shard.params}
        if self._traces is not None:
            self._traces.enter(self.rotation.active_block)
        self.step_back()
        self.reducer.open(state.shard for state in active)

    @contextmanager
    def all_trainable(self, also: Iterable[torch.nn.Parameter] = ()) -> Iterator[None]:
        """Inside, inactive parameters (`also` others) do not look frozen to DeepSpeed's checkpoint code."""
        self.require_states()
        leave_inference_mode(self._module.parameters())
        if not self._aside:
            self.guard.stop_inactive(self._active_params)
        params = {param: param.requires_grad for state in self._kept.all for param in state.shard.params}
        params.update((param, param.requires_grad) for param in also if param.is_floating_point())
        try:
            for param in params:
                param.requires_grad_(True)
            yield
        finally:
            for param, flag in params.items():
                param.requires_grad_(flag)

    @contextmanager
    def loading(self, params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Around DeepSpeed's load, which issues no collective inside: a rank that fails leaves no other waiting.

        Args:
            params: The whole model's.
        """
        self.require_states()
        self._drop_window()
        self.window_cut, self._loads = False, True
        # Below stage 3 the model file has every weight, and DeepSpeed would want what is frozen now to have been then.
        whole_in_model_file = self.config.stage < 3
        try:
            with self.all_trainable(params if whole_in_model_file else ()):
                yield
        finally:
            self._loads = False
            for state in self._kept.all:
                self.guard.note(state.shard)
            self.activate()
        self.checkpoint_event_epilogue()

    def _on_gradient(self, param: torch.nn.Parameter) -> None:
        if param.grad is None:  # switched off since the forward: torch has none for it
            return
        if not self._begun and not self._warned_of_direct:
            self._warned_of_direct = True
            logger.warning(
                "a backward came through the model that neither engine(...) nor engine.backward began: its gradients "
                "are kept for the engine's next step and are not in param.grad; to train the model in another way, end "
                "the engine with engine.destroy()"
            )
        self.reducer.on_gradient(param)
        self.queue_post_backward_callback()

    def _unit_reducer(self) -> UnitReducer:
        def give(shard: UnitShard) -> None:
            assert isinstance(self._step, BackwardStep)
            self._step.give(shard)

        turns = (self._kept.training(block) for block in range(len(self.plan.blocks)))
        numel = host_gradient_numel(self.config, ([state.shard for state in states] for states in turns))
        host = None
        if numel:
            host = HostGradients(host_memory(self.config, self.device), numel, self.config.accumulation_dtype)
        return UnitReducer(self.config, self.group, give, host)

    # The step.

    def take_left_out(self) -> int:
        """Steps whose update was left out since the last call, but for those that `overflow` has told."""
        found, self._step.left_out = self._step.left_out, 0
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One optimizer step of the active block (and the always-active parameters), then the rotation moves on.

        Collective. A gradient that is not finite changes no weight and no state. Where the host waits for the device
        (eager rules, updates on the host, dynamic loss scales) it changes nothing but the loss scale: no schedule, no
        rotation. Otherwise the kernels leave the update out by themselves, the block's turn passes, and the host hears
        of it at the next step.
        """
        if not self.states:
            raise RuntimeError(ENDED)
        self._step.begin()
        self.require_whole()
        self.require_states()
        self._begun = False
        if self.interrupted:
            raise RuntimeError(
                "the last backward ended with an error, so there is no whole gradient to step with: its window is "
                "dropped; go on with the next batch"
            )
        if not self.reducer.finished:  # a direct call, a loss that no engine's output led to, `no_sync` everywhere
            self.finish_backward(True)
        states, block = self.active_states(), self.rotation.active_block
        fault = self._step.fault(states)
        self.guard.warn_of_stopped(self._active_params)
        self.checkpoint_event_prologue()
        outcome = self._step.take(states, fault)
        self.overflow = outcome.overflow
        self.loss_scaler.update_scale(self.overflow)
        if self.offload is not None and self.offload.allgather_stream is not None:
            # DeepSpeed gathers there what has just been written here.
            self.offload.allgather_stream.wait_stream(get_accelerator().current_stream())
        if not self.overflow:
            self._advance(block, outcome.reached)

    def _advance(self, block: int, reached: bool) -> None:
        if not reached:
            self.reach.skip(block, self.rotation.at_cycle_end)
        # torch's schedulers warn when they see no step of "their" optimizer
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self.rotation.advance():
            self.activate()
        elif self.rotation.at_turn_start:  # the same block's next turn
            self.step_back()
        if self.ring is not None:
            # During the coming forward and backward.
            units = self._kept.blocks[self.rotation.active_block]
            if not self.rule.elementwise:  # which visits tiles more than once
                units = units[:1]
            self.ring.prefetch([tile for unit in units for tile in unit.tiles], self._step.begins_anew())

    def require_same_module(self) -> None:
        """Raises RuntimeError where the module has other parameters than its masters: files of both would disagree."""
        fault = self.guard.fault()
        if fault:
            raise RuntimeError(fault)

    def finish(self, before: str) -> None:
        """As `settle`, before something that makes the last step of no account: it may be no error any more."""
        self.require_states()
        try:
            self.settle()
        except RuntimeError as error:
            logger.warning("the last step before %s: %s", before, error)

    def settle(self) -> None:
        """Before the host reads or changes state: all updates have landed there and have been checked."""
        self.require_states(*STATES)
        self._step.settle()
        if self.before_change is not None:
            self.before_change()

    def _bring_up_to_date(self, state: UnitState) -> None:
        self.require_whole()
        self.settle()
        self._step.adopt_writes([state])
