"""The dynamic queue of GPS points that serve as extra negatives (paper, section 3.3)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoclip import earth


class GPSQueue(nn.Module):
    """A first-in, first-out queue of the last q places seen in training, stored in checkpoints.

    initial: the (lat, lon) degrees that it starts with; none turn it off. The queue holds coordinates and not
    embeddings: they are encoded again at every step, with gradient.
    """

    def __init__(self, initial: Float[Tensor, "q 2"]):
        super().__init__()
        self.register_buffer("places", earth.check_latlon(initial, "queue").float())
        self.register_buffer("oldest", torch.tensor(0))

    def contents(self) -> Float[Tensor, "q 2"]:
        """The places in the queue, oldest first."""
        # roll(-int(oldest)) would wait for the GPU at every step
        rows = self.oldest + torch.arange(len(self.places), device=self.places.device)
        return self.places[rows % len(self.places)]

    @torch.no_grad()
    def push(self, latlon: Float[Tensor, "b 2"]) -> None:
        """Replaces the oldest places by a batch, whose size need not divide the queue's."""
        q, b = len(self.places), len(latlon)
        if q == 0:
            return
        if b > q:
            raise ValueError(f"a batch of {b} does not fit a queue of {q}: enlarge it")
        self.places[(self.oldest + torch.arange(b, device=self.places.device)) % q] = latlon.to(self.places)
        self.oldest.copy_((self.oldest + b) % q)
