"""The engine's loading, around DeepSpeed's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hift_ds.checkpoint import content, fit, folder, manifest, pickled, plain, random_states, restore
from hift_ds.checkpoint.saved import Saved
from hift_ds.checkpoint.tensor_files import TensorFiles
from hift_ds.distributed import agree, require_alike
from hift_ds.engine_saving import SavingEngine

logger = logging.getLogger(__name__)


class LoadingEngine(SavingEngine):
    """SavingEngine that takes checkpoints over, of any number of ranks and any stage, plain DeepSpeed's too."""

    _reads: Saved | None = None  # of a load, while it goes on

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, load_module_strict: bool = True,
        load_optimizer_states: bool = True, load_lr_scheduler_states: bool = True, load_module_only: bool = False,
        custom_load_fn: Callable | None = None,
    ) -> tuple[str | None, Any]:  # fmt: skip
        """As DeepSpeedEngine.load_checkpoint; a full load resumes exactly where `save_checkpoint` was. Collective.

        Ranks, stage, blocks and the form of state may be others than then (docs/checkpoints.md).
        `load_module_only` or `load_optimizer_states=False` takes the weights alone, and masters anew from them.

        Returns:
            (path, client state), or (None, None) if `load_dir` has no "latest" and no tag was given.

        Raises:
            ValueError: There is no such checkpoint.
            RuntimeError: It does not fit this run, or a file of it is damaged. On every rank, whichever found it, and
                before anything is changed.
        """
        self._require_living()
        self.finish_saving()
        agree(self.optimizer.require_same_module)
        self.optimizer.finish("load_checkpoint()")
        whole = load_optimizer_states and not load_module_only
        schedule = load_lr_scheduler_states and not load_module_only
        counters = (self.global_steps, self.global_samples, self.skipped_steps)
        tag = agree(lambda: folder.latest_tag(load_dir)) if tag is None else str(tag)
        require_alike("checkpoint tag", tag)
        module = self.module if custom_load_fn is None else None
        saved = before = None
        if tag is not None:
            agree(lambda: folder.recover(Path(load_dir), tag) if self._keeps_a_folder() else None)
            before = manifest.identity(Path(load_dir, tag))
            saved = agree(lambda: self._open(Path(load_dir), tag, whole, schedule))
            self._reads = saved
        try:
            if tag is not None:
                agree(lambda: self._check(load_dir, tag, schedule, module, load_module_strict))

            def load() -> tuple[str | None, Any]:
                result = super(LoadingEngine, self).load_checkpoint(
                    load_dir, tag, load_module_strict, saved is not None, schedule, load_module_only, custom_load_fn
                )
                if saved is not None:
                    self.loaded_checkpoint_dp_world_size = saved.manifest["ranks"]
                if saved is not None and whole:
                    self._resume(saved)
                if tag is not None:
                    manifest.require_still(Path(load_dir, tag), before)
                return result

            with self.optimizer.loading(self.module.parameters()):
                result = agree(load)
        finally:
            self._reads = None
        self._end_window()
        if result[0] is not None and not whole:
            self.optimizer.refresh_fp32_params()
            if load_module_only:
                self.global_steps, self.global_samples, self.skipped_steps = counters
        require_alike("position in the rotation", self.optimizer.rotation.step)
        return result

    def _open(self, load_dir: Path, tag: str, whole: bool, schedule: bool) -> Saved:
        """The checkpoint, whose files are as they were written and which fits this run."""
        place, run = load_dir / tag, self.optimizer.run_state
        facts = manifest.read(place)
        files = TensorFiles()
        if facts is not None and facts["format"] == manifest.FORMAT:
            saved = Saved(facts, lambda rank, part: files.open(place / content.file_name(rank, part)))
        else:
            if facts is not None:
                fit.require_earlier_format(facts, whole)
            saved = plain.read(place, run, self.module, whole)
        if whole:
            fit.require_state_fits(run, saved)
        if schedule:
            fit.require_schedule(saved.manifest, run.scheduler)
        if facts is None or saved.plain:
            return saved
        mine = self._place()[0]
        names = sorted(facts["files"])
        if self.use_node_local_storage():
            names = [name for name in names if f"rank_{mine}_" in name or f"rank_{mine}." in name]
        else:  # each file once, whoever reads it afterwards
            names = names[mine :: run.world]
        manifest.verify(place, facts, names)
        return saved

    def _check(
        self, load_dir: str, tag: str, schedule: bool, module: torch.nn.Module | None, strict: bool
    ) -> None:
        """Refuses what DeepSpeed's part of a load would fail on half way."""
        file = pickled.opened(Path(self._get_ckpt_name(load_dir, tag)))
        samples = self.training_dataloader is not None and self.curriculum_learning_enabled()
        read = {"lr_scheduler": schedule and self.lr_scheduler is not None, "data_sampler": schedule and samples}
        for part, is_read in read.items():
            if is_read and file.get(part) is None:
                raise RuntimeError(f"the checkpoint has no {part}, and this run has one: {fit.WEIGHTS_ALONE}")
        if module is not None and self._reads is not None:
            fit.require_module_fits(self._reads.manifest["module"], module, strict)
        if read["lr_scheduler"] and self._reads is not None and self._reads.plain:
            fit.require_same_kind(file["lr_scheduler"], self.lr_scheduler)
        if read["lr_scheduler"]:
            fit.require_schedule_takes(file["lr_scheduler"], self.lr_scheduler, self.optimizer.param_groups)

    def _resume(self, saved: Saved) -> None:
        run = self.optimizer.run_state
        for note in fit.notes(run, saved):
            if self.global_rank == 0:
                logger.warning("load_checkpoint: %s", note)
        restore.load_states(run, saved)
        restore.load_position(run, saved)
        if saved.manifest["ranks"] == run.world and not saved.plain:
            random_states.restore(saved.of_rank(self._place()[0]), self.device)
        self.optimizer.reducer.discard()

    def load_module_state_dict(
        self, checkpoint: dict[str, Any], *args: Any, custom_load_fn: Callable | None = None, **kwargs: Any
    ) -> None:
        """As DeepSpeedEngine.load_module_state_dict; where weights were cut otherwise, each rank takes its slices."""
        saved, run = self._reads, self.optimizer.run_state
        whole = saved is None or saved.manifest["zero_stage"] < 3
        if saved is None or (whole and custom_load_fn is not None) or restore.same_weights(run, saved):
            kwargs["custom_load_fn"] = custom_load_fn
            super().load_module_state_dict(checkpoint, *args, **kwargs)
            return
        params = dict(self.module.named_parameters(remove_duplicate=False))
        rest = {name: value for name, value in checkpoint["module"].items() if name not in params}
        self.module.load_state_dict(rest, strict=False)
        restore.load_weights(self.module, run, saved, *self._place())

    def _load_zero_checkpoint(self, load_dir: str, tag: str, load_optimizer_states: bool = True) -> bool:
        """Nothing: `_resume` follows."""
        return True

    def _get_ckpt_name(self, checkpoints_path: str, tag: str, *args: Any, **kwargs: Any) -> str:
        """As DeepSpeedEngine._get_ckpt_name; in a load the file of the rank that was, or of rank 0."""
        if self._reads is None:
            return super()._get_ckpt_name(checkpoints_path, tag, *args, **kwargs)
        facts = self._reads.manifest
        mine = self._place()[0]
        rank = f"zero_pp_rank_{mine if mine < facts['ranks'] else 0}_" if facts["zero_stage"] == 3 else ""
        return str(Path(checkpoints_path, str(tag), f"{rank}mp_rank_00_model_states.pt"))

    # Of the engine's other half.

    def _end_window(self) -> None:
        raise NotImplementedError
