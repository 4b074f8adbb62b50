"""The image encoder's attention in one fused kernel, which never holds the matrix of weights.

segment_anything adds a bias of relative positions to that matrix: 805 MB of it in float32 for each global block of
vit_b, and three passes over it. The bias is a sum of two parts, one by the key's row and one by its column; so it is a
dot product itself, of the query's biases for all rows and columns with two one-hot vectors that say where the key is.
Appended to the queries and the keys they are part of the plain product (Li et al., MViTv2, 2022, equation 4, has the
bias).
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn


def fuse(encoder: ImageEncoderViT) -> None:
    """Replaces the attention of every block; the parameters keep their names and may still be without values."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn)


class FusedAttention(nn.Module):
    """segment_anything's Attention with the parameters of `plain`; equal to it within 1e-5 in float32."""

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        self.num_heads, self.scale = plain.num_heads, plain.scale
        self.qkv, self.proj = plain.qkv, plain.proj
        self.rel_pos_h, self.rel_pos_w = plain.rel_pos_h, plain.rel_pos_w
        self._places: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: BxSxSxC, for the side S that the tables of relative positions were made for -> the same shape."""
        batch, side, _, channels = x.shape
        q, k, v = self.qkv(x).view(batch, side * side, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        distances, one_hot = self._where(side, x)
        square = q.reshape(batch, self.num_heads, side, side, -1)
        by_row = torch.einsum("bnhwc,hkc->bnhwk", square, self.rel_pos_h[distances])
        by_column = torch.einsum("bnhwc,wkc->bnhwk", square, self.rel_pos_w[distances])
        query = torch.cat([q * self.scale, by_row.flatten(2, 3), by_column.flatten(2, 3)], -1)
        key = torch.cat([k, one_hot.expand(batch, self.num_heads, -1, -1)], -1)
        # As wide as the others, for that is all the fused kernels take.
        value = F.pad(v, (0, 2 * side))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., : v.shape[-1]]
        return self.proj(attended.transpose(1, 2).reshape(batch, side, side, channels))

    def _where(self, side: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """SxS: the row of a table for each pair of places. S*S x 2*S: the one-hot row and column of each token.

        Made once, on the device: a request need not wait for it.
        """
        if self._places is None:
            place = torch.arange(side, device=like.device)
            one = torch.eye(side, device=like.device, dtype=like.dtype)
            one_hot = torch.cat([one.repeat_interleave(side, 0), one.repeat(side, 1)], 1)
            self._places = place[:, None] - place[None, :] + side - 1, one_hot
        return self._places
