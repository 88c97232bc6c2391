"""Training what drafts for a model: a small model of its own, or streams inside it. Needs the extra `reference`."""
