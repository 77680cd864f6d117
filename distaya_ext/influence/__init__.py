"""How much each decoder layer does, and which ones a model can best do without."""
