"""The file that the docs show for a new data set runs as it stands."""

import re
from pathlib import Path

from segmentation import cli

PAGE = Path(__file__).parents[2] / "docs" / "data_sets.md"


def test_the_page_s_rules_tell_its_names_apart() -> None:
    rows = re.findall(r"^\| (`.*) \| `patient=(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    found = [[*map(eval(rule), re.findall(r"`(.*?)`", names))] for names, rule in rows]
    assert found == [["prostate_01", "FLARE22_Tr_0001", "BraTS19_2013_16_1"], ["case_00001"], ["p1", "p1"]]


def test_a_third_data_set_is_one_small_file(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"__name__": "mnms_gapmatch"}
    exec(compile(script, str(PAGE), "exec"), names)
    arguments = ["--iterations", "1", "--method", "supervised", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(names["MNMS"], "", arguments) == 0
    assert "MnMs phantom" in (tmp_path / "table.md").read_text()
