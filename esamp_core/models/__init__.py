"""Models, as transformers has them: their parts, and where their hidden states are tapped."""
