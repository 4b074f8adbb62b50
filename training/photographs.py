"""The photographs and cut-out objects that the demo models are trained on.

`training/fetch-data.sh` unpacks Debian packages into `data_folder()`; scikit-image and scikit-learn bring a
few more pictures. Every sixth is held out: training sees `"train"`, evaluation sees `"held-out"`.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

Split = Literal["train", "held-out"]
HOLD_OUT_EVERY = 6

# Photographs only: the packages also hold drawings, logos and gradients.
PHOTOGRAPHS = {
    "usr/share/backgrounds": [  # lomiri-wallpapers
        "Bridge_by_Sander_Klootwijk.jpg",
        "Dragonfly_by_Bolly.jpg",
        "Kleiber_by_Lukas_Baubkus.jpg",
        "Picture_0B_by_freespace.jpg",
        "Picture_1A_by_freespace.jpg",
        "Wine_by_Jakkub_Mede.jpg",
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "free_by_Peter_Nerlich.jpg",
        "friends_by_Aitzol_Berasategi.jpg",
        "greentock_by_Peter_Nerlich.jpg",
        "life_by_Aitzol_Berasategi.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "seeding_by_Clements_Engelhardt.jpg",
        "sunset_by_Aitzol_Berasategi.jpg",
    ],
    "usr/share/backgrounds/mate/nature": ["*.jpg"],
    "usr/share/tuxpaint/templates": ["*.jpg"],
    "usr/share/wallpapers": [  # plasma-workspace-wallpapers
        f"{name}/contents/images/2560x1600.jpg"
        for name in [
            "BytheWater",
            "ColdRipple",
            "ColorfulCups",
            "DarkestHour",
            "EveningGlow",
            "FallenLeaf",
            "Kite",
            "OneStandsOut",
            "Path",
            "summer_1am",
        ]
    ]
    + ["Volna/contents/images/5120x2880.jpg"],
}
LIBRARY_PHOTOGRAPHS = {
    ("skimage", "data"): [  # CC0 and public domain
        "astronaut.png",
        "brick.png",
        "chelsea.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "motorcycle_left.png",
        "rocket.jpg",
    ],
    ("sklearn", "datasets/images"): ["china.jpg", "flower.jpg"],  # CC-BY-2.0
}


def data_folder() -> Path:
    """Where `fetch-data.sh` unpacked the packages."""
    return Path(os.environ.get("PALIMPSEST_TRAINING_DATA", "~/.cache/palimpsest/training")).expanduser()


def photographs(split: Split) -> list[Path]:
    """Photographs (JPEG, PNG), always in the same order. Raises FileNotFoundError when any is missing."""
    folders = [(data_folder() / folder, names) for folder, names in PHOTOGRAPHS.items()]
    folders += [(_package(package) / folder, names) for (package, folder), names in LIBRARY_PHOTOGRAPHS.items()]
    return _split([path for folder, names in folders for path in _find(folder, names)], split)


def cutouts(split: Split) -> list[Path]:
    """Photographed and drawn objects with an alpha channel (PNG): animals, fruit, tools, vehicles..."""
    stamps = data_folder() / "usr/share/tuxpaint/stamps"
    kinds = [folder.name for folder in sorted(stamps.glob("*")) if folder.name != "symbols"]
    return _split(_find(stamps, [f"{kind}/**/*.png" for kind in kinds] or ["*"]), split)


def read_photograph(path: Path, longest: int) -> np.ndarray:
    """The photograph as uint8 RGB (H, W, 3), shrunk where its longest side exceeds `longest` pixels."""
    return _shrink(cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), longest)


def read_cutout(path: Path, longest: int) -> np.ndarray:
    """The cut-out as uint8 RGBA (H, W, 4), shrunk where its longest side exceeds `longest` pixels."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGRA if image.ndim == 2 else cv2.COLOR_BGR2BGRA)
    return _shrink(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA), longest)


def _find(folder: Path, names: list[str]) -> list[Path]:
    paths = [path for name in names for path in sorted(folder.glob(name))]
    if len(paths) < len(names):
        raise FileNotFoundError(
            f"{folder} lacks pictures; run training/fetch-data.sh, install training/requirements.txt"
        )
    return paths


def _split(paths: list[Path], split: Split) -> list[Path]:
    return [path for i, path in enumerate(paths) if (i % HOLD_OUT_EVERY == 0) == (split == "held-out")]


def _package(name: str) -> Path:
    if (data_folder() / name).is_dir():  # a machine without the library, or with one that lacks pictures
        return data_folder() / name
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{name} is not installed; install training/requirements.txt")
    return Path(spec.origin).parent


def _shrink(image: np.ndarray, longest: int) -> np.ndarray:
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
