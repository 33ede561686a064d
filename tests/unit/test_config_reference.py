"""docs/configuration.md is generated from the tree, and the tree is small and documented."""

from __future__ import annotations

from megatron_g2rl.config.keys import config_groups, config_keys
from megatron_g2rl.config.reference import configuration_page
from megatron_g2rl.config.tree import Config


def test_the_page_of_all_keys_is_current(repository):
    page = (repository / "docs/configuration.md").read_text()
    assert page == configuration_page(), "run `make docs` and commit docs/configuration.md"


def test_there_are_fewer_than_150_keys():
    assert len(config_keys()) < 150


def test_every_key_and_section_is_described():
    undescribed = [key.path for key in config_keys().values() if not key.description]
    undescribed += [group.name for group in config_groups() if not group.description]
    assert not undescribed


def test_the_list_of_keys_is_the_complete_tree():
    config = Config(model={"path": "a"}, data={"source": "b"}, evaluation={}).model_dump()
    assert list(config_keys()) == [f"{section}.{leaf}" for section, leaves in config.items() for leaf in leaves]
