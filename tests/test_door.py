"""`import cllm4rec`: light, and a door to what is named in its `__all__`."""

import subprocess
import sys
from pathlib import Path

import pytest

import cllm4rec


def test_every_name_of_the_door_opens():
    for name in cllm4rec.__all__:
        assert getattr(cllm4rec, name)
        assert name in dir(cllm4rec)
    assert {"Recommender", "load_config", "__version__"} <= set(cllm4rec.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cllm4rec' has no attribute 'recommend'"):
        _ = cllm4rec.recommend


def test_importing_the_package_imports_no_library():
    code = (
        "import sys; import cllm4rec; print(sorted({'torch', 'pandas', 'numpy', 'ray', 'pydantic'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
