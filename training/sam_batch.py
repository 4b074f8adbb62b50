"""What segment_anything does for one picture at a time, or while the CPU waits: for a batch, and without waiting."""

import torch
from segment_anything.modeling import PromptEncoder, Sam
from torch import Tensor

GIVEN_BACK = 0.75  # of the corrections come with the last answer's logits


def decode(
    sam: Sam,
    embedding: Tensor,
    points: tuple[Tensor, Tensor],
    boxes: Tensor | None,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """MaskDecoder.predict_masks for a batch of pictures, which it only does for one.

    embedding: (B, C, h, w); points: (N, n, 2) and (N, n), labels 0 and 1; boxes: (N, 4); previous: logits (N, 4h, 4w),
    of which GIVEN_BACK are given. Returns logits (N, 4, 4h, 4w) and scores (N, 4), float32.
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    single = torch.autocast(embedding.device.type, enabled=False)  # in half precision, clicks and rims would move
    with single:
        sparse, dense = _embed_prompts(encoder, points, boxes, previous)
        positions = encoder.get_dense_pe()
    count, (height, width) = len(sparse), embedding.shape[-2:]
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(count, -1, -1)
    each = embedding[:, None].expand(-1, count // len(embedding), -1, -1, -1).flatten(0, 1)
    tokens, source = decoder.transformer(
        each + dense, positions.expand(count, -1, -1, -1), torch.cat([own, sparse], dim=1)
    )
    upscaled = decoder.output_upscaling(source.transpose(1, 2).unflatten(2, (height, width)))
    kernels = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)], dim=1)
    scores = decoder.iou_prediction_head(tokens[:, 0])
    with single:
        logits = (kernels.float() @ upscaled.float().flatten(2)).unflatten(2, upscaled.shape[-2:])
    return logits, scores.float()


def _embed_prompts(
    encoder: PromptEncoder, points: tuple[Tensor, Tensor], boxes: Tensor | None, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As PromptEncoder does it, whose selections by label would make the CPU wait for the GPU."""
    coordinates, labels = points
    clicks = encoder.pe_layer.forward_with_coords(coordinates + 0.5, encoder.input_image_size)
    clicks = clicks + torch.where(
        labels[..., None] > 0.5, encoder.point_embeddings[1].weight, encoder.point_embeddings[0].weight
    )
    if boxes is None:
        last = encoder.not_a_point_embed.weight.expand(len(clicks), 1, -1)
    else:
        last, _ = encoder(None, boxes, None)
    nothing = encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    if previous is None:
        return torch.cat([clicks, last], 1), nothing
    given = torch.rand(len(previous), 1, 1, 1, device=previous.device) < GIVEN_BACK
    return torch.cat([clicks, last], 1), torch.where(given, encoder.mask_downscaling(previous[:, None]), nothing)


def relative_positions(q_size: int, k_size: int, rel_pos: Tensor) -> Tensor:
    """segment_anything's get_rel_pos for a square, (2n - 1, C) -> (n, n, C), without indices that it makes on the CPU.

    Those would be copied to the GPU, and waited for, twice in every block.
    """
    return rel_pos.flip(0).unfold(0, k_size, 1).flip(0).transpose(1, 2)
