"""Recipes from YAML: every shipped one loads, keys are strict, errors name file and line."""

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.load import load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name):
    assert load_recipe(name) == load_recipe(str(shipped_recipes()[name]))


def test_an_unknown_key_names_file_and_line(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("weights: int4\ngroup_sise: 64\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(file))
    assert f"{file}:2: unknown key group_sise" in str(caught.value)
    assert "did you mean `group_size`?" in str(caught.value)


def test_a_setting_changes_the_recipe_and_the_last_one_wins():
    assert load_recipe("int4", ("group_size=64", "group_size=32")).group_size == 32


def test_a_wrong_setting_is_named_instead_of_a_line():
    with pytest.raises(RecipeError, match="--set weights=int3"):
        load_recipe("int4", ("weights=int3",))
