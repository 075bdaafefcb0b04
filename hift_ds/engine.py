"""The engine hook: a DeepSpeedEngine whose optimizer rotates blocks."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero import parameter_offload
from torch.utils import _pytree as pytree

from hift_ds.compiled_layers import let_dynamo_compile
from hift_ds.config.keys import HiFTConfig
from hift_ds.config.resolve import ResolvedConfig
from hift_ds.distributed import agree
from hift_ds.engine_loading import LoadingEngine
from hift_ds.rotation.blocks import BlockPlan
from hift_ds.rotation.param_groups import (
    HyperParameters,
    check_coverage,
    check_inside,
    check_step,
    trainable_groups,
)
from hift_ds.rotation.schedule import CycleScheduler, step_once_per_cycle
from hift_ds.view import HiFT
from hift_ds.zero.activations import keep_again, use_non_reentrant_checkpointing
from hift_ds.zero.attachment import Flags
from hift_ds.zero.offload import WEIGHTS
from hift_ds.zero.optimizer import ENDED, HiFTOptimizer
from hift_ds.zero.unit_gradients import UnitReducer

logger = logging.getLogger(__name__)
LIVING: weakref.WeakSet[HiFTEngine] = weakref.WeakSet()  # from initialize to destroy


class HiFTEngine(LoadingEngine):
    """DeepSpeedEngine with a HiFTOptimizer at every ZeRO stage, 0 to 3. Build it with `hift_ds.initialize`.

    Attributes:
        hift: The user's window on blocks and rotation.
    """

    # Given by initialize() before __init__ runs, which calls _configure_optimizer.
    resolved: ResolvedConfig
    block_plan: BlockPlan
    as_found: Flags
    separate_host: bool | None = None
    # DeepSpeedEngine's own
    lr_scheduler: Any
    global_steps: int
    global_samples: int
    skipped_steps: int
    _released = _destroyed = False

    @property
    def hift_config(self) -> HiFTConfig:
        """The "hift" section, with what null has chosen."""
        return self.resolved.hift

    def gradient_clipping(self) -> float:
        """The bound in force; DeepSpeed's default is not, with updates in backward."""
        return self.resolved.clip

    def _configure_optimizer(self, client_optimizer: Any, model_parameters: Any) -> None:
        use_non_reentrant_checkpointing(self.module)
        keep_again(self.module)
        if hasattr(self.module, "_orig_mod"):  # torch.compile(model)
            self._let_dynamo_compile()
        trained = {fqn for block in self.block_plan.blocks for fqn in block.fqns} | set(self.block_plan.always_active)
        params = {name: param for name, param in self.module.named_parameters() if name in trained}
        if any(param.grad is not None for param in params.values()) and self.global_rank == 0:
            logger.warning("gradients were left on parameters before initialize: they are dropped")
        if "throughput" not in (self.config.get("timers") or {}):
            # By default this timer waits for the device at every micro step; no state would stream meanwhile.
            self.tput_timer.config.synchronized = False
        holder = self._hyper_parameters(client_optimizer, model_parameters)
        check_inside(holder, self.module)
        check_step(holder)
        self._check_for_duplicates(holder)
        for group in holder.param_groups:
            self.resolved.rule.check_group(group)
        check_coverage(holder, params)
        self.basic_optimizer = holder
        offload = self._make_offload() if self.zero_optimization_stage() == 3 else None
        self.optimizer = HiFTOptimizer(
            holder=holder,
            plan=self.block_plan,
            module=self.module,
            params=params,
            as_found=self.as_found,
            loss_scaler=CreateLossScaler(
                dtype=self.get_data_types()[0],
                static_loss_scale=self.loss_scale(),
                dynamic_scaling=self.dynamic_loss_scale(),
                dynamic_loss_args=self.dynamic_loss_scale_args(),
            ),
            offload=offload,
            device=self.device,
            group=self.seq_data_parallel_group,
            config=self.resolved,
        )
        self.optimizer.end_window = self._end_window  # type: ignore[method-assign]
        if isinstance(self.optimizer.reducer, UnitReducer):
            self.optimizer.reducer.at_boundary = self._at_boundary
        make_scheduler = getattr(self, "_configure_compression_scheduler", None)
        if make_scheduler is not None:  # DeepSpeed 0.18 asks both at each step, though neither is on
            self.compression_scheduler, self.quantizer = make_scheduler(), None
        self.hift = HiFT(self.block_plan, self.optimizer)
        self._hook_outputs()
        LIVING.add(self)

    def _hyper_parameters(self, client_optimizer: Any, model_parameters: Any) -> torch.optim.Optimizer:
        if client_optimizer is None:
            # DeepSpeed's own way would compile FusedAdam or CPUAdam just to hold a learning rate.
            return HyperParameters(trainable_groups(model_parameters), dict(self.resolved.group))
        if not isinstance(client_optimizer, torch.optim.Optimizer):
            client_optimizer = client_optimizer(model_parameters)
            self.resolved = self.resolved.with_optimizer(client_optimizer)
        if any(client_optimizer.state.values()) and self.global_rank == 0:
            logger.warning(
                "the optimizer has state (momentum) of earlier steps: HiFT does not take it over and begins with fresh "
                "state"
            )
        return client_optimizer

    def _make_offload(self) -> Any:
        """DeepSpeed's ZeRO-3 parameter manager over the whole module, able to make one coordinator per block."""
        if self.zero_allgather_sequential():  # DeepSpeed does this where it builds its own stage 3 optimizer
            self._config.zero_config.prefetch_bucket_size = 1
        original = parameter_offload.PartitionedParameterCoordinator
        made_with: dict[str, Any] = {}

        def recording(*args: Any, **kwargs: Any) -> Any:
            made_with.update(args=args, kwargs=kwargs)
            return original(*args, **kwargs)

        parameter_offload.PartitionedParameterCoordinator = recording
        try:
            offload = self._configure_zero_optimizer(optimizer=None)
        finally:
            parameter_offload.PartitionedParameterCoordinator = original
        offload.allgather_stream = made_with["kwargs"].get("allgather_stream")
        offload.new_coordinator = lambda: original(*made_with["args"], **made_with["kwargs"])
        return offload

    def _configure_lr_scheduler(self) -> None:
        super()._configure_lr_scheduler()
        if self.lr_scheduler is not None and self.resolved.hift.lr_update == "paper":
            self.lr_scheduler = CycleScheduler(self.lr_scheduler, self.optimizer.rotation)
        self.optimizer.scheduler = self.lr_scheduler
        self.optimizer.rate.try_look_ahead(self.lr_scheduler, agree)

    def _scheduler_from_config(self, optimizer: Any) -> Any:
        return super()._scheduler_from_config(optimizer.optimizer)  # torch's schedulers take torch's optimizers alone

    def follow_schedule(self, scheduler: Any, total_steps: int | None = None) -> None:
        """Tells HiFT of a schedule that the caller steps, once after each optimizer step, and of the run's length.

        For a scheduler that `initialize` has not been given: Trainer makes its own afterwards, and `HiFTCallback` calls
        this. With `lr_update: paper` its `step()` counts once per cycle from now on. Collective.

        Args:
            scheduler: Drives `lr` of the engine's param groups. Where the engine steps one of its own: left alone.
            total_steps: Optimizer steps of the whole run; `None` = not known.
        """
        self.optimizer.rate.total_steps = total_steps
        cycle = self.optimizer.rate.steps_per_cycle
        if total_steps is not None and total_steps < cycle and self.global_rank == 0:
            logger.warning(
                "the run has %d steps, and a cycle through all blocks has %d: the blocks that have no turn are not "
                "trained; train longer, or set hift.layers_per_block higher", total_steps, cycle,
            )  # fmt: skip
        if self.lr_scheduler is None and scheduler is not None:
            if self.resolved.hift.lr_update == "paper":
                step_once_per_cycle(scheduler, self.optimizer.rotation)
            self.optimizer.follow(scheduler)
            self.optimizer.rate.try_look_ahead(scheduler, agree)

    def rest(self) -> None:
        """Until the next forward in training, `requires_grad` of the module's parameters is as before `initialize`."""
        if not self._released:
            self.optimizer.step_aside()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeedEngine.compile. Each block's turn is compiled once, so dynamo may compile as often as there are.

        At its own limit of 8 it would run the rest uncompiled.
        """
        self._let_dynamo_compile()
        super().compile(*args, **kwargs)

    def _let_dynamo_compile(self) -> None:
        let_dynamo_compile(2 * len(self.block_plan.blocks) + 8)  # in evaluation and for other shapes, too
        if self.global_rank == 0:
            logger.warning(
                "torch.compile compiles the model once for each of %d blocks, in the first cycle; "
                "hift_ds.compile_layers(model) instead compiles a layer once for all", len(self.block_plan.blocks),
            )  # fmt: skip

    def allreduce_gradients(self, bucket_size: int = 0) -> None:
        """After each backward: DeepSpeed's seam for all gradient communication, at every stage."""
        self.optimizer.finish_backward(self.is_gradient_accumulation_boundary())

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """As DeepSpeedEngine.forward."""
        self._require_living()
        self.optimizer.require_states(WEIGHTS)
        if torch.is_grad_enabled():
            self.optimizer.begin_forward()
        with self.optimizer.guard.explaining():
            return super().forward(*inputs, **kwargs)

    def _hook_outputs(self) -> None:
        # A function, no method: a deepcopy of the module copies its hooks, and would copy a method's engine.
        self._output_hook = self.module.register_forward_hook(lambda *call: self._let_any_loss_have_a_backward(*call))

    def _let_any_loss_have_a_backward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook: where no output reaches the active block `loss.backward()` would raise, on this rank alone.

        Other ranks' batches may reach it, and they would wait for this one's gradient for ever. So the outputs become
        leaves that require one, and their backward is a backward of this engine.
        """
        if module is not self.module or not (module.training and torch.is_grad_enabled()):  # a deepcopy has this hook
            return
        tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if any(tensor.requires_grad for tensor in tensors):
            return
        given = {id(leaf) for leaf in (*pytree.tree_leaves(inputs), *module.buffers())}
        for tensor in tensors:
            if id(tensor) not in given and not isinstance(tensor, torch.nn.Parameter) and not tensor.is_inference():
                self._as_leaf(tensor)

    def _as_leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        # Nothing of the forward's graph leads to it, so DeepSpeed's own hooks will not begin its backward.
        tensor.requires_grad_()
        tensor.register_hook(lambda grad: self._backward_prologue())
        tensor.register_post_accumulate_grad_hook(_drop)
        return tensor

    def backward(self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> torch.Tensor:
        """As DeepSpeedEngine.backward.

        A loss that does not depend on the active block counts as a zero gradient on this rank, because other ranks'
        batches may reach the block; `step` raises if that is so on every rank.
        """
        self._require_living()
        self.optimizer.begin_backward()
        if isinstance(loss, torch.Tensor) and not loss.requires_grad:
            loss = self._as_leaf(loss.detach())
        if isinstance(loss, torch.Tensor) and loss.is_leaf:
            loss = loss.clone()  # DeepSpeed takes only what has a grad_fn for a loss
        if isinstance(loss, torch.Tensor) and scale_wrt_gas:
            # Here, because DeepSpeed before 0.19.8 divides at each of the model's outputs: twice for a loss of logits.
            loss = loss / self.gradient_accumulation_steps()
        with self.optimizer.guard.explaining():
            return super().backward(loss, retain_graph, scale_wrt_gas=False)

    def _backward_post_hook(self) -> None:
        # DeepSpeed takes a backward that began at two outputs for one after an interrupted one, and leaves its
        # gradients where they are. An interrupted one is found at the next forward, backward or step.
        if self.optimizer._backward_active_depth > 1:
            self.optimizer._backward_active_depth = 1
        super()._backward_post_hook()

    def step(self, lr_kwargs: Any = None) -> None:
        """As DeepSpeedEngine.step."""
        self._require_living()
        self.optimizer.require_states()
        reducer = self.optimizer.reducer
        inside = self.resolved.managed and not self.is_gradient_accumulation_boundary()
        if inside:
            self.optimizer.drop_interrupted()
            if not reducer.finished:
                self.optimizer.finish_backward(False)  # other ranks have reduced theirs
        super().step(lr_kwargs)
        self.optimizer.window_cut = reducer.finished = False

    def _take_model_step(self, lr_kwargs: Any) -> None:
        try:
            super()._take_model_step(lr_kwargs)
        except Exception:
            # The window has ended, though without an update: the next one begins with the next batch.
            self.optimizer.abandon_step()
            self.optimizer.window_cut = False
            self.micro_steps += 1
            self._running_engine_step = False
            self.skipped_steps += self.optimizer.take_left_out()
            raise
        self.skipped_steps += self.optimizer.take_left_out()

    def _at_boundary(self) -> bool:
        return self.is_gradient_accumulation_boundary() and not self.inside_no_sync_ctxt

    def _end_window(self) -> None:
        """Micro steps that are left of a window whose gradients were dropped must not make an update by themselves."""
        self.micro_steps += -self.micro_steps % self.gradient_accumulation_steps()

    def zero_grad(self) -> None:
        """Drops all gradients of the window, those that have been reduced too."""
        super().zero_grad()
        self.optimizer.zero_grad()

    def destroy(self) -> None:
        """Leaves the module as it was before `initialize`, with its present weights, and frees all else.

        At stage 3 parameters stay partitioned. The engine cannot be used any more. May be called again.
        """
        if not self._destroyed:
            self._destroyed = True
            self._end_saving()
            self._release()
            super().destroy()
            if self.module in parameter_offload.FWD_MODULE_STACK:  # where ZeRO-3 keeps every model for ever
                parameter_offload.FWD_MODULE_STACK.remove(self.module)

    def _release(self) -> None:
        if not self._released:
            self._released = True
            LIVING.discard(self)
            for handle in (self.module_forward_pre_hook, self.module_forward_post_hook, self._output_hook):
                handle.remove()

    def _take_back(self) -> None:
        """The inverse of `_release`."""
        self._released = False
        self.module_forward_pre_hook = self._create_module_forward_pre_hook()
        self.module_forward_post_hook = self._create_module_forward_post_hook()
        self._hook_outputs()
        LIVING.add(self)

    def _require_living(self) -> None:
        if self._released:
            raise RuntimeError(ENDED)

    def clip_fp32_gradients(self) -> None:
        """Stage 0 in fp32: DeepSpeed would clip `.grad` of the whole module; the optimizer clips the block's shard."""

    def get_global_grad_norm(self) -> Any:
        """Of the last step: `None` before it, a float at stage 0 (which waits for the device), else a tensor."""
        norm = super().get_global_grad_norm()
        return norm if norm is None or self.zero_optimization_stage() > 0 else float(norm)

    def get_lr(self) -> list[float]:
        """The learning rate in force, one per param group (the scheduler's own value is in `param_groups`)."""
        return self.optimizer.rates


def _drop(tensor: torch.Tensor) -> None:
    tensor.grad = None
