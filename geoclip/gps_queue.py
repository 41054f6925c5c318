"""The dynamic queue of GPS points that serve as extra negatives (paper, section 3.3)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoclip import earth


class GPSQueue(nn.Module):
    """A first-in, first-out queue of the last `capacity` places seen in training, stored in checkpoints.

    initial: (capacity, 2), the (lat, lon) degrees that it starts with; not needed for capacity 0. The queue
    holds coordinates and not embeddings: they are encoded again at every step, with gradient.
    """

    def __init__(self, capacity: int, initial: Float[Tensor, "q 2"] | None = None):
        super().__init__()
        if capacity and (initial is None or initial.shape != (capacity, 2)):
            found = None if initial is None else tuple(initial.shape)
            raise ValueError(f"the queue needs ({capacity}, 2) places to start with, got {found}")
        places = torch.empty(0, 2) if capacity == 0 else earth.check_latlon(initial, "queue").float()
        self.register_buffer("places", places.clone())
        self.register_buffer("oldest", torch.tensor(0))
        self.capacity = capacity

    def contents(self) -> Float[Tensor, "q 2"]:
        """The places in the queue, oldest first."""
        # roll(-int(oldest)) would wait for the GPU at every step
        rows = self.oldest + torch.arange(self.capacity, device=self.places.device)
        return self.places[rows % self.capacity]

    @torch.no_grad()
    def push(self, latlon: Float[Tensor, "b 2"]) -> None:
        """Replaces the oldest places by a batch, whose size need not divide the capacity."""
        if self.capacity == 0:
            return
        if len(latlon) > self.capacity:
            raise ValueError(f"a batch of {len(latlon)} does not fit a queue of {self.capacity}: enlarge it")
        rows = (self.oldest + torch.arange(len(latlon), device=self.places.device)) % self.capacity
        self.places[rows] = latlon.to(self.places)
        self.oldest.copy_((self.oldest + len(latlon)) % self.capacity)
