"""Paint that continues what is around it: seamless cloning (Perez, Gangnet, Blake: "Poisson Image Editing", 2003).

A model's picture also shows what is around the hole, in tones of its own. How far these are from the true ones at the
hole's edge is known, and spread into the hole as a membrane; so the paint keeps its contrasts, and no step is left
where it ends.
"""

import numpy as np
import torch

from handlers.editing.imaging import grow, shrink
from handlers.editing.prefill import prefill
from handlers.pictures.picture import RGB, Mask

THIN_CELLS = 6  # balls of five and less faded


def cloned(painted: RGB, shown: RGB, hole: Mask, cell: int) -> RGB:
    """What was painted, in tones that meet those of `shown` at the hole's edge; outside the hole it is `shown`.

    cell: pixels that the model sees of a mask at once. It paints all of a cell at the edge like the inside, so that in
    thin parts the difference would be most of the paint: there, and where nothing is known, it stays as it is.
    """
    paint, known = (torch.from_numpy(each).permute(2, 0, 1)[None].float() for each in (painted, shown))
    rim = THIN_CELLS * cell // 2
    thick = hole & grow(shrink(hole, rim), rim * 3 // 2)  # further than it shrank: corners are no thin parts
    toned = paint + prefill(known - paint, _tensor(hole)) * _tensor(thick | ~hole)
    return np.asarray(toned[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).contiguous())


def _tensor(mask: Mask) -> torch.Tensor:
    return torch.from_numpy(mask.astype(np.float32))[None, None]
