"""What the community's copies of ACDC and LA have in common: lists of names, and one h5 file a case.

Layout and lists are those of SSL4MIS (https://github.com/HiLab-git/SSL4MIS), on which UniMatch, SS-Net and BCP build.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt

from segmentation.data.parallel import in_parallel
from segmentation.errors import InputError

Image = npt.NDArray[np.float32]
Label = npt.NDArray[np.uint8]

# No whitespace, no path separator, no leading dot: a name is a file name and nothing else.
_NAME = re.compile(r"\w[\w.-]*")

LABEL_TOLERANCE = 1e-3

_MOVE = "or list this case behind the labelled ones of the training list"
BAD_LABEL = f"mend the label, {_MOVE}"
"""What to do about a label that can't be used."""
RULE = "or say how names tell patients apart: the field `patient` of the task (docs/data_sets.md)"
"""What to do about cases that are taken for one patient's and are not."""
_MISSING = {
    "image": "convert this case again",
    "label": f"unlabelled training cases alone need none: add it, {_MOVE}",
}


@dataclass(frozen=True)
class Volume:
    """One case in its own size: image float32, label uint8, one class index a voxel, both 3D."""

    name: str
    image: Image
    label: Label


def read_list(path: str | Path) -> list[str]:
    """The names in a list file, one a line, in order; a trailing `.h5` and blank last lines are dropped.

    Raises InputError where the file is missing, not text or empty, or a name is malformed or repeated.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a byte-order mark
    except FileNotFoundError:
        raise InputError(f"{path}: no such list; unpack or convert the data set first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); give a list of names") from None
    names = [line.strip().removesuffix(".h5") for line in text.rstrip().split("\n")]
    if names == [""]:
        raise InputError(f"{path}: is empty; it should hold one name a line")
    seen: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not _NAME.fullmatch(name):
            raise InputError(f"{path}:{number}: {name[:60]!r} is not a name; write one file name a line")
        if name in seen:
            raise InputError(f"{path}:{number}: {name} is listed twice; remove one of them")
        seen.add(name)
    return names


def write_list(path: Path, names: Sequence[str]) -> None:
    """Write what `read_list` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def read_image(path: str | Path) -> Image:
    """One h5 file's image as float32, of any number of dimensions; nothing else in the file is looked at.

    Raises InputError where the file is missing or damaged, lacks `image`, or holds an empty one, NaN or infinity.
    """
    (image,) = _read_datasets(Path(path), "image")
    return _checked(Path(path), image)


def read_case(path: str | Path, num_classes: int) -> tuple[Image, Label]:
    """One h5 file's image as float32 and label as uint8, of one shape and any number of dimensions.

    Raises InputError as `read_image`, where the file lacks `label`, and as `class_indices` for labels outside
    0 ... num_classes - 1.
    """
    image, label = _read_datasets(Path(path), "image", "label")
    if image.shape != label.shape:
        raise InputError(f"{path}: image {image.shape} and label {label.shape} must be of one shape")
    return _checked(Path(path), image), class_indices(Path(path), label, range(num_classes), BAD_LABEL)


def class_indices(path: Path, label: np.ndarray, classes: Sequence[int], remedy: str) -> Label:
    """`label` as uint8. A number within 1e-3 of a whole one is that one, as scaled files need it; bool is 0 and 1.

    Raises InputError, with `remedy`, for the first number that is none of `classes`.
    """
    whole = label.astype(np.uint8) if label.dtype.kind == "b" else label
    if label.dtype.kind == "f":
        nearest = np.rint(label)
        with np.errstate(invalid="ignore"):  # infinity
            whole = np.where(abs(label - nearest) <= LABEL_TOLERANCE, nearest, label)
    wrong = ~np.isin(whole, classes)
    if wrong.any():
        allowed = ", ".join(map(str, classes))
        raise InputError(f"{path}: holds the label {label[wrong][0]}; each has to be one of {allowed}: {remedy}")
    return whole.astype(np.uint8, copy=False)


def write_case(path: Path, image: Image, label: Label | None) -> None:
    """Write what `read_case` reads, or without a label what `read_image` reads.

    The file appears under its name only once it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with h5py.File(part, "w") as file:
        file.create_dataset("image", data=image, compression="lzf")
        if label is not None:
            file.create_dataset("label", data=label, compression="lzf")
    part.replace(path)


def check_files(paths: Iterable[Path]) -> None:
    """Raise InputError for the first missing file: seconds into a run, not after an hour of training."""
    paths = list(paths)
    for path, there in zip(paths, in_parallel(Path.is_file, paths), strict=True):
        if not there:
            raise InputError(f"{path}: no such file; unpack or convert the data set first")


def patient_of(name: str) -> str:
    """The patient to whom a case or slice belongs, as ACDC names them: its name up to the first `_`."""
    return name.split("_")[0]


def check_patients(splits: Mapping[str, Sequence[str]], patient: Callable[[str], str] = patient_of) -> None:
    """Raise InputError for the first patient that is in two of `splits`: a test on it would be no test.

    patient: whose a case is, by its name.
    """
    seen: dict[str, tuple[str, str]] = {}
    for split, names in splits.items():
        for name in names:
            other, case = seen.setdefault(patient(name), (split, name))
            if other != split:
                raise InputError(
                    f"{case} in {other}.list and {name} in {split}.list are of one patient, {patient(name)}: "
                    f"keep a patient in one list, {RULE}"
                )


def patients_for_share(percent: float, patients: int) -> int:
    """How many of the training patients a labelled share of `percent` is: rounded down, at least one.

    Of ACDC's 70: 1, 3 and 7 patients for 1, 5 and 10 %; of LA's 80: 1, 4 and 8, the field's own numbers.
    Raises InputError for a share outside (0, 100].
    """
    if not 0 < percent <= 100:
        raise InputError(f"a labelled share of {percent} % is outside (0, 100]; try 1, 5 or 10")
    return max(1, int(patients * percent / 100))


def split_by_patients(
    names: Sequence[str], patients: int, patient: Callable[[str], str] = patient_of, seed: int | None = None
) -> tuple[list[str], list[str]]:
    """The slices of the first `patients` patients (labelled), and all others (unlabelled).

    In list order, which is what the field does, or with a `seed` in a random one.
    No patient is ever on both sides; `patient` says whose a slice is, by its name. With all of them labelled nothing is
    left unlabelled. Raises InputError where nothing would be labelled, or there are not as many.
    """
    order = list(dict.fromkeys(map(patient, names)))
    if len(order) == 1:
        raise InputError(f"all {len(names)} training cases are of one patient, {order[0]}: list more, {RULE}")
    if not 0 < patients <= len(order):
        raise InputError(f"{patients} labelled of {len(order)} patients: choose 1 to {len(order)}")
    if seed is not None:
        random.Random(seed).shuffle(order)
    chosen = set(order[:patients])
    labelled = [name for name in names if patient(name) in chosen]
    unlabelled = [name for name in names if patient(name) not in chosen]
    return labelled, unlabelled


def require_dimensions(path: Path, image: Image, axes: str) -> None:
    """Raise InputError unless `image` has as many dimensions as `axes`, such as "(H, W)", names."""
    if image.ndim != axes.count(",") + 1:
        raise InputError(f"{path}: shape {image.shape} where {axes} was expected; is it in the right folder?")


def _checked(path: Path, image: np.ndarray) -> Image:
    image = image.astype(np.float32, copy=False)
    if image.size == 0:
        raise InputError(f"{path}: the image is empty, of shape {image.shape}; convert this case again")
    if not np.isfinite(image).all():
        raise InputError(f"{path}: the image holds NaN or infinite values; convert this case again")
    return image


def _read_datasets(path: Path, *keys: str) -> list[np.ndarray]:
    try:
        content = BytesIO(path.read_bytes())  # HDF5 asks for 28 pieces, and a slow file system takes its time for each
        with h5py.File(content, "r") as file:
            return [_read_numbers(file, key) for key in keys]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; unpack or convert the data set first") from None
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {error.args[0]}") from None
    except (OSError, RuntimeError, ValueError) as error:  # what h5py raises for damage, by its place
        raise InputError(f"{path}: not a readable h5 file ({error}); unpack it again") from None


def _read_numbers(file: h5py.File, key: str) -> np.ndarray:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"has no dataset `{key}`; {_MISSING[key]}")
    if dataset.dtype.kind not in ("iufb" if key == "label" else "iuf"):
        raise TypeError(f"`{key}` holds {dataset.dtype}, not numbers; convert this case again")
    return dataset[()]
