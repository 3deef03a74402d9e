"""The folder of real data: an empty CLLM4REC_SHARED means the default, not the current folder."""

from pathlib import Path

import pytest
from support.shared import shared_folder

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.parametrize("environment", [{}, {"CLLM4REC_SHARED": ""}], ids=["unset", "empty"])
def test_without_a_name_the_shared_folder_is_beside_the_checkout(environment):
    assert shared_folder(environment) == CHECKOUT.parent / "shared"


def test_a_name_is_the_shared_folder():
    assert shared_folder({"CLLM4REC_SHARED": "elsewhere"}) == Path("elsewhere")
