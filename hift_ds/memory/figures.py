"""What a forecast says: bytes of every block by role, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hift_ds.memory.request import Request

ROLES = ("weights", "gradients", "state", "activations")
MEASURED_ROLES = (*ROLES, "other")  # other: what was there before the first step and is none of these
PHASES = ("forward", "backward", "update")
COLOURS = dict(zip(MEASURED_ROLES, ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860"), strict=True))


def mib(count: float) -> str:
    """Bytes in MiB, as tables show them."""
    return f"{count / 2**20:,.1f}"


def gib(count: float) -> str:
    """Bytes in GiB, as tables show them."""
    return f"{count / 2**30:,.2f}"


@dataclass(frozen=True)
class Moment:
    """Device bytes on top of those that are there at all times.

    Attributes:
        weights: Gathered for the moment.
        made: By the update.
    """

    phase: str
    weights: int = 0
    gradients: int = 0
    activations: int = 0
    made: int = 0

    @property
    def nbytes(self) -> int:
        return self.weights + self.gradients + self.activations + self.made


@dataclass(frozen=True)
class Figures:
    """Bytes of one rank while one block trains.

    Attributes:
        name: The block's.
        numel: Its parameters.
        weights: Model weights on the device at the peak, those gathered for a moment included.
        state: Ring (or resident state), always-active state, and in the update what it makes.
        gradients: Gradients and buckets at the peak.
        activations: What forward and backward hold at the peak.
        phase: When the peak is, one of `PHASES`.
        host_state: The block's masters and moments on the host.
        to_device: State and weights over the bus per optimizer step.
        to_host: The way back.
        network: Handed to collectives per optimizer step.
    """

    name: str
    numel: int
    weights: int
    state: int
    gradients: int
    activations: int
    phase: str
    host_state: int
    to_device: int
    to_host: int
    network: int

    @property
    def peak(self) -> int:
        """Device bytes at the worst moment."""
        return self.weights + self.state + self.gradients + self.activations

    def to_json(self) -> dict[str, Any]:
        """Every figure by its name, and the peak."""
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Forecast:
    """The forecast for a request.

    Attributes:
        blocks: By index.
        full: Full fine-tuning by DeepSpeed's own optimizer, same stage, precision and workload.
        host: Bytes of host memory of a rank: masters, moments, and weights where they are offloaded.
        full_host: The same of full fine-tuning.
        uncounted: Names of blocks that text does not reach: the activations of images are in no figure.
    """

    request: Request
    model: str
    blocks: tuple[Figures, ...]
    full: Figures
    host: int
    full_host: int
    uncounted: tuple[str, ...] = ()

    @property
    def worst(self) -> Figures:
        """The block with the highest peak."""
        return max(self.blocks, key=lambda block: block.peak)

    @property
    def saved(self) -> str:
        """What HiFT's peak is of full fine-tuning's, as `-50 %`."""
        return f"{100 * (self.worst.peak / self.full.peak - 1):+.0f} %"

    @property
    def fits(self) -> bool | None:
        """Whether card and node suffice; `None` if neither is known."""
        verdicts = [v for v in (self.fits_device, self.fits_host) if v is not None]
        return all(verdicts) if verdicts else None

    @property
    def fits_device(self) -> bool | None:
        """Whether the card holds the worst peak."""
        return self.request.card_holds(self.worst.peak)

    @property
    def fits_host(self) -> bool | None:
        """Whether the node holds the states of its ranks."""
        return self.request.node_holds(self.host)
