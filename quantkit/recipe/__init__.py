"""What the user wants (a recipe, YAML), and what that means for one checkpoint (a plan)."""

from quantkit.recipe.load import load_recipe, shipped_recipes
from quantkit.recipe.model import Override, Recipe
from quantkit.recipe.plan import LinearPlan, QuantPlan, make_plan

__all__ = ["LinearPlan", "Override", "QuantPlan", "Recipe", "load_recipe", "make_plan", "shipped_recipes"]
