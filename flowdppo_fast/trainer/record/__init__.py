"""Recording chosen denoising steps of a pipeline, and replaying them."""
