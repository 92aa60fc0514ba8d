import pytest
from made_up import made_up_mirror


@pytest.fixture
def mirror(tmp_path):
    return made_up_mirror(tmp_path)
