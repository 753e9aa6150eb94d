"""From a store to a recipe: candidates, knapsack, recipe, measured KL, checks, and exports as text."""
