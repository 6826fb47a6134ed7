"""What evaluations share: models and texts, recipes, methods under test, scoring, replay, tables."""
