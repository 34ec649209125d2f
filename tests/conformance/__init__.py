"""timm's own model tests over the models of the zoo, and what timm does not enumerate: see docs/conformance.md."""
