"""A label's voxels in the order of its image's, by what the headers of the two files say.

The same places can be stored in other directions: flipped along an axis, or with two axes swapped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from segmentation.data.conversion import NO_LABEL
from segmentation.errors import InputError

Array = npt.NDArray[np.float64]

AS_STORED = io_orientation(np.eye(4))
TOLERANCE = 0.5  # voxels: nearer to its counterpart than to any other voxel
SAME_SPACING = 0.01  # a share; tells in a message a spacing that differs from an angle that differs
SAME_ANGLE = 1.0  # degrees; tells an angle that differs from a place that differs


@dataclass(frozen=True)
class Scan:
    """The voxels of a file, and where its header says that they lie.

    Attributes:
        path: of the file.
        voxels: axes in the file's order.
        affines: (4, 4) each, from a voxel's indices to its place in millimetres; several where a header can be read in
            several ways, in an order that is the same for all files; none where it does not say.
        space: the axes of those millimetres; places in two spaces can't be compared.
    """

    path: Path
    voxels: np.ndarray
    affines: Sequence[Array] = ()
    space: str = "RAS"

    def says(self) -> bool:
        """Whether the header makes sense."""
        return len(self.affines) > 0 and all(
            np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3 for affine in self.affines
        )


def paired(image: Scan, label: Scan, by_voxel: bool = False) -> np.ndarray:
    """The label's voxels, turned into the image's order where the two headers disagree in it.

    A header that does not say where its voxels lie is taken to agree with the other, and so is an origin of 0 where no
    axis has to be turned. Of the readings of two headers one has to agree.

    Args:
        image: 3D.
        label: 3D.
        by_voxel: pair the voxels as they are stored, whatever the headers say.

    Raises:
        InputError: the shapes differ, or by the headers a voxel of the label lies half a voxel or more from the
            image's. Names both files and what is different.
    """
    compared = image.says() and label.says() and image.space == label.space and not by_voxel
    turn = _turn(image.affines[0], label.affines[0]) if compared else AS_STORED
    voxels = apply_orientation(label.voxels, turn) if label.voxels.ndim == 3 else label.voxels
    if voxels.shape != image.voxels.shape:
        raise InputError(
            f"{label.path}: shape {label.voxels.shape} where {image.path} has {image.voxels.shape}; {NO_LABEL}"
        )
    if compared:
        _require_same_places(image, label, turn)
    return voxels


def _turn(image: Array, label: Array) -> Array:
    """How the label's axes lie along the image's, in nibabel's form: for each an axis, and 1 or -1."""
    along = np.eye(4)
    along[:3, :3] = np.linalg.inv(_directions(image)) @ _directions(label)
    return io_orientation(along)


def _directions(affine: Array) -> Array:
    """Of the three axes, in columns of length 1."""
    return affine[:3, :3] / voxel_sizes(affine)


def _require_same_places(image: Scan, label: Scan, turn: Array) -> None:
    turned = [affine @ inv_ornt_aff(turn, label.voxels.shape) for affine in label.affines]
    pairs = list(zip(image.affines, turned, strict=True))
    if (turn == AS_STORED).all():
        pairs = [_with_origins(*pair) for pair in pairs]
    differences = [_difference(*pair, image.voxels.shape) for pair in pairs]
    if all(differences):
        raise InputError(
            f"{image.path} and {label.path}: by their headers {differences[0]}; bring the label into the image's "
            "voxels, or give --by-voxel if they match as they are stored"
        )


def _with_origins(image: Array, label: Array) -> tuple[Array, Array]:
    """The same, both at the origin where one of them is: many tools write 0 for an origin that they don't know."""
    origins = [affine[:3, 3] for affine in (image, label)]
    if all(origin.any() for origin in origins):
        return image, label
    image, label = image.copy(), label.copy()
    image[:3, 3] = label[:3, 3] = 0
    return image, label


def _difference(image: Array, label: Array, shape: tuple[int, ...]) -> str:
    """What is different between two lattices of one shape; nothing where each voxel lies at its counterpart."""
    corners = np.array(list(product(*((0, side - 1) for side in shape))))
    places = apply_affine(label, corners)
    if (abs(apply_affine(np.linalg.inv(image), places) - corners) < TOLERANCE).all():
        return ""
    spacings = voxel_sizes(image), voxel_sizes(label)
    if not np.allclose(*spacings, rtol=SAME_SPACING):
        theirs, ours = (" x ".join(f"{side:.4g}" for side in spacing) for spacing in spacings)
        return f"voxels are {theirs} mm in one and {ours} mm in the other"
    cosines = (_directions(image) * _directions(label)).sum(0)
    angle = float(np.degrees(np.arccos(cosines.clip(-1, 1))).max())
    if angle > SAME_ANGLE:
        return f"axes are {angle:.0f} degrees apart"
    apart = float(np.linalg.norm(apply_affine(image, corners) - places, axis=1).max())
    return f"they lie {apart:.3g} mm apart"
