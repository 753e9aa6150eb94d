"""Number formats as ModelOpt reads them: quantizer attributes, recipes, and mixed-precision recipe files."""
