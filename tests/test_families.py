"""Every family of families.py as a teacher and as a student; what docs/models.md says of it is true. Slow."""

import pytest
from conftest import mixed_samples, write_llava
from families import SPECS, can_run, genrecal, rows_of, run_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("families") / "data", mixed_samples(6))


@pytest.fixture(scope="module")
def cache(tiny, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("families") / "cache"
    assert (
        genrecal("cache", f"--teacher={tiny('qwen2_vl')}", f"--data={data}", f"--out={out}", "--device=cpu")[0]
        == "works"
    )
    return out


@pytest.mark.parametrize("family", sorted(SPECS))
def test_the_table_is_true(family, tmp_path, data, cache):
    if not can_run(family):
        pytest.skip("needs torchvision (and timm)")
    row = run_family(family, tmp_path, data, cache)
    assert row == rows_of()[family]
