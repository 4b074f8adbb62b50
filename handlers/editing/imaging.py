"""Pure functions on masks (HxW bool): grow, shrink, fill, smooth."""

import cv2
import numpy as np
from numpy.typing import NDArray

from handlers.pictures.picture import Mask


def dilate(mask: Mask, kernel_size: int) -> Mask:
    """Grows a mask by a square kernel; an even size acts as the next odd one, so that the mask never shifts."""
    if kernel_size <= 1:
        return mask
    kernel = np.ones((kernel_size | 1, kernel_size | 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def grow(mask: Mask, radius: int) -> Mask:
    """Every pixel within `radius` px (Euclidean, so a dot becomes a disc) of a True pixel is True."""
    if radius <= 0 or not mask.any():
        return mask
    return np.asarray(distance_inside(~mask) <= radius)


def shrink(mask: Mask, radius: int) -> Mask:
    """The reverse: only pixels more than `radius` px away from every False pixel stay. The border shrinks nothing."""
    return ~grow(~mask, radius)


def fill_holes(mask: Mask) -> Mask:
    """False regions that a True region encloses become True; those that touch the border don't."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    within = np.s_[top : top + height, left : left + width]  # nothing beyond it is enclosed
    padded = np.pad(~mask[within], 1, constant_values=True).astype(np.uint8)
    # 4-connected, so that a diagonal line of True pixels encloses.
    _, labels = cv2.connectedComponents(padded, connectivity=4)
    filled = mask.copy()
    filled[within] = labels[1:-1, 1:-1] != labels[0, 0]
    return filled


def smooth(mask: Mask, radius: int) -> Mask:
    """Rounds an edge's steps and corners of up to about `radius` px: a Gaussian of that sigma, cut at one half.

    A straight edge stays where it is; what is thinner than the radius may vanish.
    """
    if radius <= 0:
        return mask
    blurred = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), radius, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(blurred > 0.5)


def distance_inside(mask: Mask) -> NDArray[np.float32]:
    """HxW float32: how far each True pixel is from the nearest False one, in px (1 beside it); 0 outside."""
    return np.asarray(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))


def grow_to_cells(mask: Mask, cell: int) -> Mask:
    """Fills every cell x cell block (sides must be multiples of cell) that holds a True pixel.

    A diffusion model sees the mask once per latent; a thin stroke between two samples would be lost.
    """
    return cells(mask, cell).repeat(cell, axis=0).repeat(cell, axis=1)


def cells(mask: Mask, cell: int) -> Mask:
    """ceil(H / cell) x ceil(W / cell) bool: whether each block holds a True pixel."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % cell), (0, -width % cell)))
    return np.asarray(padded.reshape(padded.shape[0] // cell, cell, -1, cell).any(axis=(1, 3)))
