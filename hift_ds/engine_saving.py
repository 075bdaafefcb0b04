"""The engine's saving, around DeepSpeed's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from hift_ds.checkpoint import content, fit, folder, manifest, random_states, restore
from hift_ds.checkpoint.background import BackgroundSave, Job
from hift_ds.checkpoint.save import Save
from hift_ds.checkpoint.tensor_files import FileFacts, Summed, facts_of, num_bytes, write_tensors
from hift_ds.config.resolve import ResolvedConfig
from hift_ds.distributed import agree, of_all_ranks, require_alike
from hift_ds.rotation.rotation import Rotation
from hift_ds.shards import full_numel, slice_numel
from hift_ds.state.unit_state import UnitState

logger = logging.getLogger(__name__)


class SavingEngine(DeepSpeedEngine):
    """DeepSpeedEngine whose checkpoints are of any number of ranks and any stage.

    What DeepSpeed's engine needs of itself stays in its own file (counters, schedule, client state, below stage 3 the
    module); masters, moments and what is cut over ranks are in safetensors files (`checkpoint.content`), and
    `hift.json` has all facts.
    """

    optimizer: Any
    resolved: ResolvedConfig
    _failed: Exception | None = None  # of a save, until all ranks have heard of it
    _background: BackgroundSave | None = None

    def save_checkpoint(
        self, save_dir: str, tag: str | None = None, client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True, exclude_frozen_parameters: bool = False, asynchronous: bool | None = None,
    ) -> bool:  # fmt: skip
        """As DeepSpeedEngine.save_checkpoint: position, masters and state of every block are in it. Collective.

        Written beside its place and put there as a whole: whatever is cut off, the folder `tag` is the old checkpoint
        or the new one.

        Args:
            asynchronous: Write what waits for its turn in a thread while training goes on. The folder is in its place
                some time later, or after `finish_saving`; an error comes there, at the next save, load or `destroy`.
                `None`: as `hift.asynchronous_save` says.

        Raises:
            OSError: No room on the disk, or not writable; nothing of an older checkpoint is lost. On every rank.
        """
        self._require_living()
        self.finish_saving()
        run = self.optimizer.settled_run()  # what is wrong with the last step is said first
        self.skipped_steps += self.optimizer.take_left_out()
        tag = f"global_step{self.global_steps}" if tag is None else str(tag)
        if not save_dir:
            return super().save_checkpoint(save_dir, tag)  # which refuses it
        asynchronous = self.resolved.hift.asynchronous_save if asynchronous is None else asynchronous
        require_alike("checkpoint tag and how it is saved", (tag, asynchronous))
        save = Save(Path(save_dir), tag, save_latest, exclude_frozen_parameters, self._keeps_a_folder())
        self._make_room(run, save.root)
        agree(lambda: folder.begin(save.root, tag) if save.keeps else None)
        try:
            # Plain DeepSpeed would take it for one without optimizer state, at stage 3 without weights, and go on. It
            # stops at another number of ranks, and says it.
            whose = f"{run.world} under HiFT, which has to load it (hift_ds),"
            marked = {**(client_state or {}), "dp_world_size": whose}
            with self.optimizer.saving():
                super().save_checkpoint(save_dir, folder.unfinished(tag), marked, False, save.without_frozen)
            facts = {**content.facts(run), **self._facts(save.without_frozen)}
            asynchronous = asynchronous and not self.use_node_local_storage()
            jobs = agree(lambda: self._jobs(run, save, asynchronous))
            if asynchronous:
                self._save_in_background(save, jobs, facts)
                return True
            files: dict[str, FileFacts] = {}
            for of_rank in of_all_ranks(agree(lambda: {n: f for job in jobs.values() for n, f in job().items()})):
                files.update(of_rank)
            agree(lambda: save.describe(facts, files))
        except Exception:
            save.drop()
            raise
        agree(save.finish)
        return True

    @property
    def saves_in_background(self) -> bool:
        """Whether this rank, or the one that puts the folder in its place, still has something to do for a save."""
        return self._background is not None and self._background.goes_on

    def finish_saving(self) -> None:
        """Waits for a save that goes on in the background. Collective.

        Raises:
            Exception: What has gone wrong with it, on any rank; there is no new checkpoint then.
        """
        background, self._background = self._background, None
        self.optimizer.before_turn = self.optimizer.before_change = None
        if any(of_all_ranks(background is not None)):
            agree(lambda: None if background is None else background.wait())

    def _end_saving(self) -> None:
        """As `finish_saving` where nobody else can be asked any more: what has gone wrong is logged."""
        background, self._background = self._background, None
        try:
            if background is not None:
                background.wait()
        except Exception:
            logger.exception("the checkpoint that was being saved in the background is not there")

    def _save_in_background(self, save: Save, jobs: dict[str, Job], facts: dict[str, Any]) -> None:
        """What changes at the next step now, the rest in the order of the turns to come."""
        mine, world = self._place()
        rotation = self.optimizer.rotation
        order = [f"block_{block}" for block in _from_now(rotation)]
        now = ("always", order[0], "rest")
        begun = agree(lambda: save.begin_report(mine))
        files = agree(lambda: {n: f for name in now if name in jobs for n, f in jobs.pop(name)().items()})
        later = {name: jobs.pop(name) for name in order if name in jobs} | jobs

        def conclude(written: Mapping[str, FileFacts], error: Exception | None) -> None:
            save.report(mine, begun, {**files, **written}, error)
            if save.keeps:
                save.conclude(world, facts)

        background = self._background = BackgroundSave(later, conclude)
        self.optimizer.before_turn = lambda block: background.ensure(f"block_{block}")
        self.optimizer.before_change = background.flush

    def _jobs(self, run: content.RunState, save: Save, watched: bool) -> dict[str, Job]:
        """What this rank has to write, by part; "rest": what else is its own, "model": DeepSpeed's file, written.

        Args:
            watched: Weights must be what they are now when they are written.
        """
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        place = save.place

        def of_part(part: str, states: Sequence[UnitState]) -> dict[str, FileFacts]:
            tensors = {name: tensor for state in states for name, tensor in content.tensors_of(state).items()}
            name = content.file_name(run.rank, part)
            summed = {name: Summed(tensors[name]) for name in sums.get(part, ())}
            facts = write_tensors(place / name, {**tensors, **summed}, content.phases(states))
            if {fqn: tensor.sum for fqn, tensor in summed.items()} != sums.get(part, {}):
                raise RuntimeError(
                    f"weights of {part} were written while they were saved in the background, so the checkpoint is "
                    "dropped: call engine.finish_saving() before you change weights"
                )
            return {name: facts}

        def of_rest() -> dict[str, FileFacts]:
            name = content.file_name(self._place()[0])
            random, metadata = random_states.present(self.device)
            return {name: write_tensors(place / name, {**random, **self._untrained(save.without_frozen)}, metadata)}

        model = Path(self._get_ckpt_name(str(place.parent), place.name))
        parts = run.parts if self._writes_state() else {}
        sums = {part: content.sums_of_weights(states) for part, states in parts.items()} if watched else {}
        jobs: dict[str, Job] = {part: partial(of_part, part, states) for part, states in parts.items()}
        jobs["rest"] = of_rest
        if self.save_non_zero_checkpoint:
            jobs["model"] = lambda: {model.name: facts_of(model)}
        return jobs

    def _keeps_a_folder(self) -> bool:
        return self.global_rank == 0 or (self.use_node_local_storage() and self.local_rank == 0)

    def _writes_state(self) -> bool:
        return self.zero_optimization_stage() > 0 or self.global_rank == 0

    def _make_room(self, run: content.RunState, root: Path) -> None:
        mine = sum(num_bytes(content.tensors_of(state)) for state in run.states) if self._writes_state() else 0
        if self.save_non_zero_checkpoint and self.zero_optimization_stage() < 3:
            mine += sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())
        needed = mine if self.use_node_local_storage() else sum(of_all_ranks(mine))

        def check() -> None:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"save_checkpoint: {str(root)!r} is no folder and cannot be made one ({error})") from None
            folder.require_room(root, needed)

        agree(lambda: check() if self._keeps_a_folder() else None)

    def _untrained(self, without_frozen: bool) -> dict[str, torch.Tensor]:
        """What is in no block: this rank's slices at stage 3, else all of it on rank 0, where buffers are, too."""
        frozen = {} if without_frozen else self._frozen()
        first, sharded = self.global_rank == 0, self.zero_optimization_stage() == 3
        found = {name: value.contiguous() for name, value in self._saved_buffers().items()} if first else {}
        if sharded:
            found.update((name, restore.held_weights(param, *self._place())[0]) for name, param in frozen.items())
        elif first:
            found.update((name, param.detach().contiguous()) for name, param in frozen.items())
        return found

    def _saved_buffers(self) -> dict[str, torch.Tensor]:
        params = dict(self.module.named_parameters(remove_duplicate=False))
        found = self.module.state_dict(keep_vars=True)
        return {name: value for name, value in found.items() if torch.is_tensor(value) and name not in params}

    def _frozen(self) -> dict[str, torch.nn.Parameter]:
        trained = self.optimizer.trained
        return {name: param for name, param in self.module.named_parameters() if param not in trained}

    def _place(self) -> tuple[int, int]:
        group = self.optimizer.group
        return dist.get_rank(group=group), dist.get_world_size(group=group)

    def _facts(self, without_frozen: bool) -> dict[str, Any]:
        frozen, shapes = self._frozen(), fit.shapes_in(self.module)
        if without_frozen:
            shapes = {name: shape for name, shape in shapes.items() if name not in frozen}
        ranks = self._place()[1] if self.zero_optimization_stage() == 3 else 1
        to_json = getattr(getattr(self.module, "config", None), "to_json_string", None)  # of a model of transformers
        return {
            "module": shapes,
            "frozen": {} if without_frozen else {n: slice_numel(full_numel(p), ranks) for n, p in frozen.items()},
            "buffers": sorted(self._saved_buffers()),
            "tied": self._tied(),
            "model_config": None if to_json is None else json.loads(to_json(use_diff=False)),
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "skipped_steps": self.skipped_steps,
            "written_by": manifest.versions(),
        }

    def _tied(self) -> dict[str, str]:
        """Other names of parameters."""
        names = {param: name for name, param in self.module.named_parameters()}
        return {
            name: names[param] for name, param in self.module.named_parameters(remove_duplicate=False)
            if name != names[param]
        }  # fmt: skip

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's own file. An error here, on one rank, would leave the others at a barrier."""
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:
            self._failed = error

    def _save_zero_checkpoint(self, save_path: str, tag: str) -> None:
        """Nothing: the optimizer's part is ours."""

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeedEngine.save_16bit_model. Collective."""
        self._require_living()
        with self.optimizer.all_trainable():
            return super().save_16bit_model(*args, **kwargs)

    def module_state_dict(self, *args: Any, exclude_frozen_parameters: bool = False, **kwargs: Any) -> Any:
        """As DeepSpeedEngine.module_state_dict; what waits for its turn is not frozen."""
        with self.optimizer.all_trainable() if exclude_frozen_parameters else nullcontext():
            return super().module_state_dict(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)

    def _zero3_consolidated_16bit_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        with self.optimizer.all_trainable():  # Trainer asks for it without the frozen parameters
            return super()._zero3_consolidated_16bit_state_dict(*args, **kwargs)

    # Of the engine's other half.

    global_steps: int
    global_samples: int
    skipped_steps: int

    def _require_living(self) -> None:
        raise NotImplementedError


def _from_now(rotation: Rotation) -> list[int]:
    """Blocks in the order of their turns, the present one first."""
    order = rotation.order
    start = order.index(rotation.active_block)
    return [*order[start:], *order[:start]]
