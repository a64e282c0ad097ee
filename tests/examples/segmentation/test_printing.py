"""Every script prints paths that standard output has no characters for."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import acdc_gapmatch
import image_classification
import la_gapmatch
import toy_boundary
from segmentation.data import convert_acdc, convert_la
from segmentation.data.files import write_list
from segmentation.printing import show_every_character

ODD, SHOWN = "dät\N{SNOWMAN}", r"d\xe4t\u2603"
SCRIPTS = (acdc_gapmatch, la_gapmatch, image_classification, toy_boundary, convert_acdc, convert_la)


def ascii_stream(errors: str = "strict") -> io.TextIOWrapper:
    """As standard output in a log file of a machine without a locale."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors, write_through=True)


def written(stream: io.TextIOWrapper) -> str:
    return stream.buffer.getvalue().decode()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_script_can_print_any_path(script) -> None:
    with redirect_stdout(ascii_stream()) as stdout:
        with pytest.raises(UnicodeEncodeError):
            print(ODD)
        with pytest.raises(SystemExit):
            script.main(["--help"])
        print(ODD)
    assert written(stdout).endswith(f"{SHOWN}\n")


def test_a_folder_of_any_name_is_read(tmp_path: Path) -> None:
    root = tmp_path / ODD
    for split, names in {"train_slices": ["p1_a", "p2_a"], "val": ["p3_a"], "test": ["p4_a"]}.items():
        write_list(root / f"{split}.list", names)
        for name in names:
            path = root / "data" / ("slices" if split == "train_slices" else "") / f"{name}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"not h5")
    arguments = ["--data", str(root), "--patients", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    with redirect_stdout(ascii_stream()) as stdout:
        assert acdc_gapmatch.main(arguments) == 2
    assert f"reading {tmp_path}/{SHOWN}\n" in written(stdout)


def test_a_stream_that_loses_nothing_is_left_as_it_is() -> None:
    with redirect_stdout(ascii_stream("surrogateescape")) as stdout:
        show_every_character()
    assert stdout.errors == "surrogateescape"
    with redirect_stdout(io.StringIO()):  # as in a notebook: it can't be told what to do
        show_every_character()
