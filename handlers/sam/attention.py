"""The image encoder's attention without the matrix of weights, and without work for the padding of windows.

segment_anything adds a bias of relative positions to that matrix: 805 MB of it in float32 for each global block of
vit_b, and three passes over it. The bias is a sum of two parts, one by the key's row and one by its column (Li et al.,
MViTv2, 2022, equation 4). A GPU's fused kernels take no bias: there the two parts stand beside the queries, one-hot
vectors of each key's row and column beside the keys, and the bias is part of the plain product. A CPU would pay for
those longer vectors in full, but its fused kernel takes a bias: it gets that of a few queries at a time.

segment_anything pads the tokens with zeros to whole windows, and they take part as keys: 804 beside 4,096 in the
published networks. What a zero becomes is known without computing it: the bias of the projection.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor, nn

_PIECE = 1 << 22
"""Numbers of the bias that are in memory at once on a CPU: 16 MB."""


def fuse(encoder: ImageEncoderViT) -> None:
    """Replaces the attention of every block; the parameters keep their names and may still be without values."""
    for block in encoder.blocks:
        block.attn = FusedAttention(block.attn, block.window_size)
        block.window_size = 0  # the attention looks after its windows itself


class FusedAttention(nn.Module):
    """segment_anything's Attention with the parameters of `plain`, in windows of `window` tokens a side; 0: in one.

    Equal to it within 1e-6 of its largest output in float32.
    """

    def __init__(self, plain: Attention, window: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.window = plain.num_heads, plain.scale, window
        self.qkv, self.proj = plain.qkv, plain.proj
        self.rel_pos_h, self.rel_pos_w = plain.rel_pos_h, plain.rel_pos_w

    def forward(self, x: Tensor) -> Tensor:
        """x: 1xSxSxC, where without windows S is the side that the tables of relative positions were made for -> the
        same shape."""
        attend = self._attend_on_cpu if x.device.type == "cpu" else self._attend
        return self.proj(attend(self._windows(self.qkv(x)[0]), x.shape[1]))[None]

    def _windows(self, qkv: Tensor) -> Tensor:
        """SxSx3C -> 3 x rows x columns x heads x W x W x c: queries, keys and values of each window."""
        size, side = qkv.shape[0], self.window or qkv.shape[0]
        count = -(-size // side)
        if count * side > size:
            padded = self.qkv.bias.expand(count * side, count * side, -1).contiguous()
            padded[:size, :size] = qkv
            qkv = padded
        return qkv.view(count, side, count, side, 3, self.num_heads, -1).permute(4, 0, 2, 5, 1, 3, 6)

    def _attend(self, windows: Tensor, size: int) -> Tensor:
        """-> size x size x C: what each token takes from its window, before the projection."""
        _, rows, columns, heads, side, _, channels = windows.shape
        _, one_hot = _places(side, windows.device, windows.dtype)
        query, key, value = windows.reshape(3, rows * columns, heads, side, side, channels)
        bias = [part.flatten(2, 3) for part in self._bias(query)]
        query = torch.cat([query.flatten(2, 3) * self.scale, *bias], -1)
        key = torch.cat([key.flatten(2, 3), one_hot.expand(rows * columns, heads, -1, -1)], -1)
        # As wide as the others, for that is all the fused kernels take.
        value = F.pad(value.flatten(2, 3), (0, 2 * side))
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :channels]
        whole = attended.view(rows, columns, heads, side, side, channels).permute(0, 3, 1, 4, 2, 5)
        return whole.reshape(rows * side, columns * side, -1)[:size, :size]

    def _attend_on_cpu(self, windows: Tensor, size: int) -> Tensor:
        """Computes what _attend does."""
        _, rows, columns, heads, side, _, channels = windows.shape
        whole = windows.new_empty(size, size, heads, channels)
        for row in range(rows):
            for column in range(columns):
                place = whole[row * side :, column * side :][:side, :side].permute(2, 0, 1, 3)
                query, key, value = windows[:, row, column]
                # Nobody looks at what padding takes.
                query = query[:, : place.shape[1], : place.shape[2]]
                self._attend_in_pieces(query, key.flatten(1, 2), value.flatten(1, 2), place)
        return whole.flatten(2)

    def _attend_in_pieces(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """query, out: heads x height x width x c. key, value: heads x tokens x c. Writes to out."""
        of_row = query.shape[2] * key.shape[1]
        rows, heads = max(1, _PIECE // of_row), max(1, _PIECE // (of_row * query.shape[1]))
        by_row, by_column = self._bias(query)
        parts = (query, by_row, by_column, key, value, out)
        for q, h, w, k, v, target in zip(*(each.split(heads) for each in parts), strict=True):
            for q_, h_, w_, target_ in zip(*(each.split(rows, 1) for each in (q, h, w, target)), strict=True):
                bias = torch.empty((*h_.shape, w_.shape[-1]), dtype=q.dtype)
                torch.add(h_[..., None], w_[..., None, :], out=bias)
                attended = F.scaled_dot_product_attention(
                    q_.flatten(1, 2)[None], k[None], v[None], bias.view(1, len(q), -1, k.shape[1]), scale=self.scale
                )
                target_.copy_(attended.view(target_.shape))

    def _bias(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """query: ... x height x width x c -> ... x height x width x W: the bias by the key's row, and by its column."""
        height, width = query.shape[-3:-1]
        side = len(self.rel_pos_h) // 2 + 1
        distances, _ = _places(side, query.device, query.dtype)
        by_row = torch.einsum("...hwc,hkc->...hwk", query, self.rel_pos_h[distances[:height]])
        by_column = torch.einsum("...hwc,wkc->...hwk", query, self.rel_pos_w[distances[:width]])
        return by_row, by_column


@lru_cache(maxsize=8)
def _places(side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """SxS: the row of a table for each pair of places. S*S x 2*S: the one-hot row and column of each token.

    Made once, on the device, for all blocks: a request need not wait for it.
    """
    place = torch.arange(side, device=device)
    one = torch.eye(side, device=device, dtype=dtype)
    one_hot = torch.cat([one.repeat_interleave(side, 0), one.repeat(side, 1)], 1)
    return place[:, None] - place[None, :] + side - 1, one_hot
