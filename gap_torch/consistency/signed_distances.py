"""Signed distance maps of labels, as DTC and SASSNet learn them: exact, and without waiting for the device."""

import torch
from torch import Tensor


@torch.no_grad()
def signed_distances(labels: Tensor, num_classes: int) -> Tensor:
    """How far each pixel is from the surface of each class but the background, negative inside.

    d_out is the Euclidean distance from a pixel outside of the class to the nearest pixel inside, d_in the distance
    from a pixel inside to the nearest pixel outside. With maxima over the image:

        s = d_out / max(d_out) - d_in / max(d_in),  and 0 on the inner boundary, where d_in = 1

    A class that is not there, or fills the image, has zeros. Distances are in pixels or voxels, whatever their size,
    and an image knows nothing beyond its edge: the map of a crop is not a crop of the map. As in the public code of DTC
    (Luo et al., AAAI 2021) and SASSNet (Li et al., MICCAI 2020) for one class; for several classes, DTC's author says
    that each has a map.

    Args:
        labels: (B, *spatial), integer; classes outside 0 to K - 1 count as background.
        num_classes: number of classes, K, background included.

    Returns:
        (B, K - 1, *spatial) in [-1, 1], of the default dtype.

    Examples:
        >>> import torch
        >>> from gap_torch.consistency import signed_distances
        >>> signed_distances(torch.tensor([[0, 0, 1, 1, 1]]), num_classes=2)
        tensor([[[ 1.0000,  0.5000,  0.0000, -0.6667, -1.0000]]])
    """
    classes = torch.arange(1, num_classes, device=labels.device).view(-1, *[1] * (labels.ndim - 1))
    inside = labels.unsqueeze(1) == classes
    to_inside, to_outside = _distance_to(torch.stack([inside, ~inside])).unbind()
    over = tuple(range(2, inside.ndim))
    outer, inner = (d / d.amax(over, keepdim=True) for d in (to_inside, to_outside))
    # inf / inf and 0 / 0 are of a class that is not there, or has all
    return torch.where(to_outside == 1, 0.0, outer - inner).nan_to_num(0.0)


def _distance_to(mask: Tensor) -> Tensor:
    """Euclidean distance of each pixel to the nearest that is True in `mask` (2, B, C, *spatial), or infinity.

    Axis by axis: the least of f(j) + (i - j)^2 over all j, with f the squared distance along the axes before.
    """
    squared = _along_the_last_axis(mask).square()
    for axis in range(3, mask.ndim - 1):
        squared = _along(axis, squared)
    return squared.sqrt()


def _along_the_last_axis(mask: Tensor) -> Tensor:
    """Distance to the nearest True in the same row: the last one behind a pixel, or the next ahead."""
    place = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.get_default_dtype())
    behind = torch.where(mask, place, -torch.inf).cummax(-1).values
    ahead = torch.where(mask, place, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return torch.minimum(place - behind, ahead - place)


def _along(axis: int, f: Tensor) -> Tensor:
    """Least of f(j) + (i - j)^2 over j, at each i: distance by distance, for all pairs at once would take much memory.

    Squares are whole numbers, exact in float32 up to sides of 2,000 and more.
    """
    least, side = f.clone(), f.shape[axis]
    for distance in range(1, side):
        rest = side - distance
        for here, there in ((0, distance), (distance, 0)):
            at = least.narrow(axis, here, rest)
            torch.minimum(at, f.narrow(axis, there, rest) + distance**2, out=at)
    return least
