"""`genrecal doctor`: what is there is said as it is, and what is missing or broken is named with what to do."""

import importlib.metadata
import json
import re
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


def test_a_package_that_is_there():
    found = doctor.check_package(Requirement("pillow>=1"))
    assert found == doctor.Package("pillow", importlib.metadata.version("pillow"), ">=1", "")


@pytest.mark.parametrize(
    "wanted, fault",
    [
        ("no-such-package>=1", "not installed"),
        ("pillow>=999", "expected >=999, got "),
        ("pillow<1", "expected <1, got "),
    ],
)
def test_a_package_that_is_missing_or_of_another_version(wanted, fault):
    assert doctor.check_package(Requirement(wanted)).fault.startswith(fault)


def test_a_package_that_does_not_load(tmp_path, monkeypatch):
    """Installed, of the right version, and broken."""
    facts = tmp_path / "broken_one-2.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 2.0\n")
    (tmp_path / "broken_one.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor.check_package(Requirement("broken-one>=1"))
    assert found.version == "2.0"
    assert found.fault == "cannot be imported: OSError: libcudart.so.99: cannot open shared object file"


@pytest.fixture
def broken_torchvision(tmp_path, monkeypatch):
    """As one built for CUDA is beside a CPU build of torch."""
    facts = tmp_path / "torchvision-0.28.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_torchvision_for_another_torch_is_blamed_and_not_peft(broken_torchvision):
    names = ("torchvision", "peft", "pillow")
    packages = {name: doctor.check_package(Requirement(name)) for name in names}
    assert packages["peft"].fault.startswith("cannot be imported")  # the real peft, by way of the real transformers
    doctor.blame_torchvision(packages)
    assert packages["torchvision"].fault == "cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    assert packages["peft"].fault.startswith("does not load beside this torchvision: pip uninstall torchvision")
    assert not packages["pillow"].fault


@pytest.mark.parametrize(
    "torch, remedy",
    [
        ("2.13.0", 'pip install torchvision "torch==2.13.0"'),
        (
            "2.13.0+cpu",
            'pip install torchvision "torch==2.13.0+cpu" --index-url INDEX, where INDEX is that of torch\'s cpu builds',
        ),
        ("2.11.1+cu128", 'pip install torchvision "torch==2.11.1+cu128" --index-url INDEX, .* cu128 builds'),
    ],
)
def test_the_torchvision_that_is_recommended_leaves_torch_as_it_is(monkeypatch, torch, remedy):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
    assert re.match(remedy.replace("+", r"\+"), doctor._remedy("torchvision"))


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
    free = facts["disk"][str(tmp_path.resolve())]
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    (lacking,) = (need for need in facts["needs"] if need["missing"])
    assert lacking == {
        "what": "attention = none_such",
        "missing": "no-such-package: not installed",
        "remedy": "pip install no-such-package",
    }
    versions = {item["name"]: item["version"] for item in facts["packages"]}
    assert versions["torch"] == importlib.metadata.version("torch") and versions["s3fs"]


def test_a_broken_environment_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_package", lambda wanted: doctor.Package(wanted.name, None, "", "not installed"))
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stopped.value.code == 1 and "- every command: " in out
    assert '- cache --backend vllm: vllm: not installed (pip install "genrecal[vllm]")' in out
