"""The two networks as a CPU multiplies them fastest in bfloat16: the same functions, in another order of work.

A few images or places at a time go through all layers, so that what one layer leaves is still in the cache
for the next; weights are kept in the order in which oneDNN reads them; and sums between layers stay in
float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from geoclip.location_encoder import FourierLevel, LocationEncoder

IMAGES_AT_ONCE = 4  # of 2 to 8, 4 and 5 were fastest for ViT-L/14 on two cores
PLACES_AT_ONCE = 2048
DTYPE = torch.bfloat16
QUICK_GELU = 1.702


def is_plain(visual: nn.Module) -> bool:
    """Whether `visual` is a vision transformer of CLIP's own kind, without any of open_clip's variations."""
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer

    if type(visual) is not VisionTransformer or visual.attn_pool is not None or visual.pool_type != "tok":
        return False
    if visual.proj is None or visual.final_ln_after_pool or not isinstance(visual.ln_pre, nn.LayerNorm):
        return False
    return all(
        type(block) is ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.ls_2, nn.Identity)
        and isinstance(block.mlp.gelu, QuickGELU | nn.GELU)
        and getattr(block.mlp.gelu, "approximate", "none") == "none"
        for block in visual.transformer.resblocks
    )


class Tower(nn.Module):
    """images (n, 3, p, p) → (n, c) bfloat16, as the open_clip tower `visual`, whose weights are copied.

    ValueError for a tower that is not plain (is_plain). For answering alone, on this CPU: it has no
    parameters to train, and RuntimeError where it is moved or converted.
    """

    def __init__(self, visual: nn.Module):
        super().__init__()
        if not is_plain(visual):
            raise ValueError("the tower is no plain CLIP vision transformer")
        first = visual.transformer.resblocks[0].attn
        self.heads, self.width = first.num_heads, first.embed_dim
        self.patch = visual.conv1.kernel_size[0]
        self.embed_patches = Linear(visual.conv1.weight.flatten(1), visual.conv1.bias)
        self.layers = [_Layer(block) for block in visual.transformer.resblocks]
        self.ln_pre, self.ln_post = _norm(visual.ln_pre), _norm(visual.ln_post)
        self.proj = visual.proj.detach().float().clone()
        self.position = visual.positional_embedding.detach().float().clone()
        self.position[0] += visual.class_embedding.detach().float()

    @torch.inference_mode()
    def forward(self, images: Float[Tensor, "n 3 p p"]) -> Float[Tensor, "n c"]:
        return torch.cat([self._few(part) for part in images.split(IMAGES_AT_ONCE)])

    def _apply(self, fn, recurse: bool = True) -> "Tower":
        probe = torch.empty(0)
        if (moved := fn(probe)).device != probe.device or moved.dtype != probe.dtype:
            raise RuntimeError(
                "this image tower is laid out for the CPU in bfloat16: load the model again to move it"
            )
        return super()._apply(fn, recurse)

    def _few(self, images: Tensor) -> Tensor:
        n = len(images)
        patches = functional.unfold(images.float(), self.patch, stride=self.patch).transpose(1, 2)
        x = self.position.repeat(n, 1, 1)
        x[:, 1:] += self.embed_patches(patches.to(DTYPE))
        x = self.ln_pre(x).flatten(0, 1)
        for layer in self.layers:
            layer(x, n, self.heads)
        return (self.ln_post(x.view(n, -1, self.width)[:, 0]) @ self.proj).to(DTYPE)


class _Layer:
    """One residual block, added in place to x (n · l, c) in float32."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.attn, block.mlp
        self.ln_1, self.ln_2 = _norm(block.ln_1), _norm(block.ln_2)
        weight, bias = (
            attention.in_proj_weight.detach().float().clone(),
            attention.in_proj_bias.detach().float().clone(),
        )
        for part in (weight, bias):
            part[: len(part) // 3] *= (
                attention.head_dim**-0.5
            )  # the queries: so their products need no scaling
        self.qkv, self.out = Linear(weight, bias), Linear(attention.out_proj.weight, attention.out_proj.bias)
        # x σ(1.702 x) is silu(1.702 x) / 1.702: the factor goes into the weights, one pass instead of three
        quick = not isinstance(mlp.gelu, nn.GELU)
        scale = QUICK_GELU if quick else 1.0
        self.activation = functional.silu if quick else functional.gelu
        self.up = Linear(mlp.c_fc.weight * scale, mlp.c_fc.bias * scale)
        self.down = Linear(mlp.c_proj.weight / scale, mlp.c_proj.bias)

    def __call__(self, x: Tensor, n: int, heads: int) -> None:
        qkv = self.qkv(self.ln_1(x).to(DTYPE)).view(n, -1, 3, heads, x.shape[1] // heads)
        seen = torch.empty(n, qkv.shape[1], heads, qkv.shape[4], dtype=DTYPE)
        for image, into in zip(qkv, seen, strict=True):  # its scores fit in the cache
            q, k, v = image.permute(1, 2, 0, 3).contiguous()
            weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
            into.copy_(torch.bmm(weights, v).transpose(0, 1))
        x += self.out(seen.view(x.shape))
        x += self.down(self.activation(self.up(self.ln_2(x).to(DTYPE))))


class Linear:
    """x (…, i) → (…, o) in bfloat16, its weights (o, i) in oneDNN's own order; with relu, max(0, ·) of that."""

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool = False):
        self.bias = None if bias is None else bias.detach().to(DTYPE)
        self.then = "relu" if relu else "none"
        # what torch.compile's freezing does; the plain order costs a tenth more time
        plain = weight.detach().to(DTYPE).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(plain, PLACES_AT_ONCE)

    def __call__(self, x: Float[Tensor, "*m i"]) -> Float[Tensor, "*m o"]:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.then, [], "")


def _norm(norm: nn.LayerNorm):
    """The layer norm in float32."""
    weight, bias = norm.weight.detach().float().clone(), norm.bias.detach().float().clone()
    return lambda x: functional.layer_norm(x, weight.shape, weight, bias, norm.eps)


class Places:
    """latlon (m, 2) in degrees → (m, d) float32, not normalised, as `encoder`, whose weights are copied.

    Projection, Fourier phase and the sum over the levels are float32, as everywhere.
    """

    def __init__(self, encoder: LocationEncoder):
        self.encoder = encoder
        self.levels = [(level, _layers(level.mlp)) for level in encoder.levels]

    @torch.inference_mode()
    def __call__(self, latlon: Float[Tensor, "m 2"]) -> Float[Tensor, "m d"]:
        return torch.cat([self._few(part) for part in latlon.split(PLACES_AT_ONCE)])

    def _few(self, latlon: Tensor) -> Tensor:
        xy = self.encoder.project(latlon)
        # without Fourier features the coordinates themselves would be rounded
        return sum(
            level(xy) if level.frequencies is None else self._level(level, layers, xy)
            for level, layers in self.levels
        )

    @staticmethod
    def _level(level: FourierLevel, layers: list[Linear], xy: Tensor) -> Tensor:
        x = level.features(xy).to(DTYPE)
        for layer in layers:
            x = layer(x)
        return x.float()


def _layers(mlp: nn.Sequential) -> list[Linear]:
    """The MLP's linear layers, all but the last with the ReLU that follows it."""
    linear = [layer for layer in mlp if isinstance(layer, nn.Linear)]
    return [Linear(layer.weight, layer.bias, relu=layer is not linear[-1]) for layer in linear]
