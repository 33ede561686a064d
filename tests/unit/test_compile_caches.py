"""Compile caches of a rank: on its machine, in a folder that only the user can write to."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from megatron_g2rl.distributed import environment


@pytest.fixture
def local(tmp_path, monkeypatch) -> Path:
    """The default folder, without settings of the user."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for variable in environment.COMPILE_CACHES:
        monkeypatch.setenv(variable, "")  # so that it is restored afterwards
        monkeypatch.delenv(variable)
    return tmp_path / f"megatron_g2rl_{os.getuid()}"


def test_caches_are_on_this_machine_and_writable_only_by_the_user(local):
    environment._keep_compile_caches_local()
    environment._keep_compile_caches_local()  # the next run finds the folder
    folders = {variable: Path(os.environ[variable]).parent for variable in environment.COMPILE_CACHES}
    assert folders == dict.fromkeys(environment.COMPILE_CACHES, local)
    assert stat.S_IMODE(local.stat().st_mode) == 0o700
    assert cache_dir() == str(local / "inductor")  # the compiler's own value


def test_settings_of_the_user_are_kept(local, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    environment._keep_compile_caches_local()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine" and os.environ["VLLM_CACHE_ROOT"] == str(local / "vllm")


@pytest.mark.parametrize("made", ["writable", "link", "file"])
def test_a_folder_that_others_may_have_created_is_not_used(local, tmp_path, caplog, made):
    if made == "writable":
        local.mkdir()
        local.chmod(0o777)
    elif made == "link":
        local.symlink_to(tmp_path, target_is_directory=True)
    else:
        local.touch()
    environment._keep_compile_caches_local()
    assert not any(variable in os.environ for variable in environment.COMPILE_CACHES)
    assert f"{local} cannot be used" in caplog.text
