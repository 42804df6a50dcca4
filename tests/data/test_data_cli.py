import json

import pytest
from needs import PHOTOGRAPHS

from rafce_ray.cli.data import main

LONDON = PHOTOGRAPHS / "london_smiles"
HOW = ["data.emotions=[calm,glad]", "data.action_units=[4,12,25]"]


def test_audit_prints_tables_and_the_next_command(make_faces, capsys):
    root = make_faces(100)
    assert main(["audit", str(root), *HOW]) == 0
    captured = capsys.readouterr()
    assert "AU12" in captured.out
    said = captured.err.splitlines()
    assert said[0].startswith(f"Auditing {root}")
    assert "rafce train" in captured.err.replace("\n", " ")


def test_audit_as_json_on_standard_output_and_in_a_file(make_faces, tmp_path, capsys):
    root = make_faces(100)
    assert main(["audit", str(root), *HOW, "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["audit", str(root), "--json", str(tmp_path / "audit.json"), *HOW]) == 0
    assert json.loads((tmp_path / "audit.json").read_text()) == printed
    assert printed["may_train"] is True
    assert printed["splits"]["train"]["action_units"]["AU12"]["positives"] == 30


def test_a_refused_dataset_exits_with_3_and_says_why(make_faces, capsys):
    root = make_faces(30)
    file = root / "RAFCE_AUlabel.txt"
    file.write_text(file.read_text().replace(" 12", " smile"))
    assert main(["audit", str(root), *HOW, "--labels-only"]) == 3
    captured = capsys.readouterr()
    assert "RAFCE_AUlabel.txt:2" in captured.out
    assert "Refused" in captured.err


def test_usage_errors_exit_with_2(make_faces, tmp_path, capsys):
    assert main(["audit", str(tmp_path / "nowhere")]) == 2
    assert main(["audit", str(make_faces(5)), "data.emotion=[x]"]) == 2
    assert "did you mean 'data.emotions'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["audit"])


def test_synthesize_draws_says_where_and_can_be_audited(tmp_path, capsys):
    out = tmp_path / "drawn"
    assert main(["synthesize", "--out", str(out), "--num-images", "20", "--seed", "3"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("Drawing 20 labelled faces")
    assert f"data.root={out}" in said.replace("\n", "")
    assert len((out / "RAFCE_emolabel.txt").read_text().splitlines()) == 20
    assert main(["synthesize", "--out", str(out), "--num-images", "20"]) == 2


@pytest.mark.needs("photographs")
def test_photographs_audit_cleanly(capsys):
    how = ["data.emotions=[neutral,smiling]", "data.action_units=[AU12]", "data.null_policy=negative"]
    assert main(["audit", str(LONDON), *how, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
