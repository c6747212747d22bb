"""Pictures with prompts: listed, cut, encoded once and kept, and read as batches."""
