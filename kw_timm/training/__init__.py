"""Training and evaluating classifiers by the published recipes: ``kw-timm train`` and ``kw-timm validate``."""

from .published import PUBLISHED
from .recipes import RECIPES, Recipe, recipe_of

__all__ = ['PUBLISHED', 'RECIPES', 'Recipe', 'recipe_of']
