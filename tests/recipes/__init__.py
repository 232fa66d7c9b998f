"""How the tiny checkpoints of the tests are made, family by family."""

from tests.recipes import audio, hybrid, images, ovis2, tiles, video
from tests.recipes.base import Recipe

RECIPES: dict[str, Recipe] = {
    **images.RECIPES,
    **tiles.RECIPES,
    **hybrid.RECIPES,
    **video.RECIPES,
    **audio.RECIPES,
    **ovis2.RECIPES,
}
