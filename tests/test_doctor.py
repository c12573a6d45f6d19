"""`genrecal doctor` reports what is there as it is, and names what is missing or broken with what to do."""

import importlib.metadata
import json
import shutil
import sys

import pytest
from packaging.requirements import Requirement

from genrecal import doctor
from genrecal.cli import main


def test_requirements_are_those_of_the_project():
    base, extras = doctor.requirements()
    assert {"torch", "transformers", "pyarrow"} <= {item.name for item in base}
    assert [item.name for item in extras["ray"]] == ["ray"] and "pytest" not in {item.name for item in base}
    assert doctor.EXTRAS.keys() <= extras.keys()


@pytest.mark.parametrize(
    "wanted, fault",
    [
        ("pillow>=1", ""),
        ("no-such-package>=1", "not installed"),
        ("pillow>=999", "expected >=999, got "),
        ("pillow<1", "expected <1, got "),
    ],
)
def test_a_package(wanted, fault):
    found = doctor.check_package(Requirement(wanted))
    assert found.fault.startswith(fault) and bool(found.fault) == bool(fault)
    assert found.version == (importlib.metadata.version("pillow") if "pillow" in wanted else None)


def test_a_torchvision_for_another_torch_is_blamed_and_not_peft(tmp_path, monkeypatch):
    """As one built for CUDA is beside a CPU build of torch."""
    facts = tmp_path / "torchvision-0.28.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = {name: doctor.check_package(Requirement(name)) for name in ("torchvision", "peft", "pillow")}
    assert packages["peft"].fault.startswith("cannot be imported")  # the real peft, by way of the real transformers
    doctor.blame_torchvision(packages)
    assert packages["torchvision"].fault == "cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    assert packages["peft"].fault.startswith("does not load beside this torchvision: pip uninstall torchvision")
    assert not packages["pillow"].fault


@pytest.mark.parametrize("build", ["", "cpu", "cu128"])
def test_the_torchvision_that_is_recommended_leaves_torch_as_it_is(monkeypatch, build):
    version = "2.13.0" + ("+" + build if build else "")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    command, index, where = doctor._remedy("torchvision").partition(
        " --index-url INDEX, where INDEX is that of torch's "
    )
    assert command == f'pip install torchvision "torch=={version}"'
    assert bool(index) == bool(build) and where.startswith(build)


@pytest.mark.slow
def test_the_command(capsys, monkeypatch, tmp_path):
    """Everything the project needs is installed where its tests run, and one thing that is not is asked for."""
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "attention = none_such"})
    monkeypatch.setattr(doctor, "EXTRAS", {"s3": "caches at s3:// URLs"})
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", "--out", str(tmp_path), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert facts["python"] == ".".join(map(str, sys.version_info[:3])) and facts["memory"] > 0
    assert facts["disk"][str(tmp_path.resolve())] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert [need for need in facts["needs"] if need["missing"]] == [
        {
            "what": "attention = none_such",
            "missing": "no-such-package: not installed",
            "remedy": "pip install no-such-package",
        }
    ]
    versions = {item["name"]: item["version"] for item in facts["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch") and versions["s3fs"]


def test_a_broken_environment_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_package", lambda wanted: doctor.Package(wanted.name, None, "", "not installed"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "- every command: " in out
    assert '- cache --backend vllm: vllm: not installed (pip install "genrecal[vllm]")' in out
