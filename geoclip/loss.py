"""The contrastive loss (paper, section 3.3, equation 3)."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def contrastive_loss(
    images: Float[Tensor, "b d"],
    places: Float[Tensor, "m d"],
    logit_scale: Float[Tensor, ""],
    target: Int[Tensor, " b"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean cross-entropy of each image's own place among all places, and the share of images it wins.

    images, places: unit-norm embeddings; row `target[i]` of `places` belongs to image i, and all other rows
    (the rest of the batch and the GPS queue) are its negatives. logit_scale: s; logits are cosine × e^s.
    """
    logits = logit_scale.exp() * images @ places.T
    top1 = (logits.argmax(-1) == target).float().mean()
    return functional.cross_entropy(logits.float(), target), top1
